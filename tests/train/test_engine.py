"""A step is defined globally: the same gradient for any number of ranks, micro-batches and any packing.

Real DeepSpeed ZeRO-2 over gloo, a real NF4 base. With plain SGD at learning rate 1 and no clipping the fp32
masters move by exactly minus the gradient, so that is read off them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ZERO_2, RunRanks

LENGTHS = (3, 40, 17, 5, 29, 11, 8, 23)


def sequences(seed: int = 0) -> list[Any]:
    """Ragged rows with a supervised tail, of which one has a single supervised token."""
    from anima.data.encode import IGNORE_INDEX, TokenSequence

    generator = np.random.default_rng(seed)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = generator.integers(5, 280, length).astype(np.int32)
        labels = ids.copy()
        labels[: length - 1 if number == 1 else length // 2] = IGNORE_INDEX
        rows.append(TokenSequence(ids, labels))
    return rows


def gradient(model_dir: str, dtype: str, budget: int, packing: bool, travel: str = "fp32") -> dict[str, Any]:
    """One step on this rank's part; the whole gradient and what the engine says about itself."""
    import torch.distributed as dist

    from anima.config.schema import LoraConfig, ModelConfig
    from anima.data.batching import assign, collate, filler
    from anima.distributed import read_ranks
    from anima.model.base_model import fingerprint, load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.objectives.sft import SupervisedFineTuning
    from anima.train import gradients as gradients_file
    from anima.train.engine import Engine
    from anima.train.metrics import MetricSums
    from anima.train.step import train_step

    gradients_file._PIECE = 1000  # the norm in several pieces, as that of a large adapter
    ranks = read_ranks()
    compute = Compute(torch.device("cpu"), getattr(torch, dtype), "test")
    base = load_base(ModelConfig(model_name_or_path=model_dir), compute)
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=16), dtype=compute.dtype, seed=1), "all")
    generator = torch.Generator().manual_seed(2)
    for parameter in lora_b_parameters(network).values():
        parameter.data.normal_(0, 0.02, generator=generator)
    parameters = list(trainable_parameters(network).values())
    settings = {**ZERO_2, "bf16": {"enabled": dtype == "bfloat16"}, "communication_data_type": travel}
    client = torch.optim.SGD(parameters, lr=1.0)
    engine = Engine(network, client, settings, ranks, fingerprint)
    engine.train_mode()
    zero = engine._engine.optimizer
    before = zero.single_partition_of_fp32_groups[0].clone()
    rows = sequences()
    shares = assign(
        [len(row) for row in rows], world_size=ranks.world_size, micro_batch_tokens=budget, packing=packing
    )[ranks.rank]
    batches = [collate([rows[i] for i in part]) if part else filler(rows[0]) for part in shares]
    sums = MetricSums()
    outcome = train_step(engine, SupervisedFineTuning(), batches, 1.0, sums)
    part = before - zero.single_partition_of_fp32_groups[0]
    parts = [torch.empty_like(part) for _ in range(ranks.world_size)]
    dist.all_gather(parts, part)
    numel = sum(parameter.numel() for parameter in parameters)
    return {
        "gradient": torch.cat(parts)[:numel],
        "norm": outcome.grad_norm,
        "loss": sums.reduce()["loss"],
        "micro_batches": len(batches),
        "state_bytes": engine.optimizer_state_bytes(),
    }


FP32_LAYOUTS = [(1, 200, True), (1, 45, True), (1, 200, False), (2, 80, True), (2, 200, False), (4, 45, True)]
BF16_LAYOUTS = [(1, 200, True), (1, 200, False), (2, 80, True)]


@pytest.mark.parametrize(
    ("dtype", "layouts", "tolerance"),
    [("float32", FP32_LAYOUTS, 1e-6), ("bfloat16", BF16_LAYOUTS, 1e-3)],
)
def test_the_gradient_does_not_depend_on_ranks_micro_batches_or_packing(
    run_ranks: RunRanks, tiny_llama_dir: Path, dtype: str, layouts: list[tuple[int, int, bool]], tolerance: float
) -> None:
    results = {
        layout: run_ranks(gradient, layout[0], str(tiny_llama_dir), dtype, layout[1], layout[2])[0]
        for layout in layouts
    }
    reference = results[(1, 200, True)]
    assert reference["micro_batches"] == 1
    assert results[(1, 200, False)]["micro_batches"] == len(LENGTHS)
    assert reference["gradient"].norm() > 0
    for layout, result in results.items():
        difference = (result["gradient"] - reference["gradient"]).norm() / reference["gradient"].norm()
        assert difference < tolerance, (layout, difference)
        assert result["loss"] == pytest.approx(reference["loss"], rel=tolerance)
        assert result["norm"] == pytest.approx(float(reference["gradient"].norm()), rel=tolerance)


def test_gradients_travel_in_bf16_if_the_json_says_so(run_ranks: RunRanks, tiny_llama_dir: Path) -> None:
    arguments = (str(tiny_llama_dir), "float32", 80, True)
    exact = run_ranks(gradient, 2, *arguments)[0]["gradient"]
    rounded = run_ranks(gradient, 2, *arguments, "bf16")[0]["gradient"]
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 4e-3  # of two roundings to 8 bits


def stop_within(engine: Any, loss_sum: torch.Tensor) -> None:
    """Raise between the backward passes of a step and its reduction."""
    with engine.accumulating():
        engine.backward(loss_sum, torch.ones(()))
        raise RuntimeError("in the midst of a step")


def failing_step(model_dir: str) -> tuple[bool, bool, float]:
    """Whether a step that failed left gradients behind; whether one of NaN was skipped; the norm of the next."""
    from anima.config.schema import LoraConfig, ModelConfig
    from anima.data.batching import collate
    from anima.distributed import read_ranks
    from anima.model.base_model import fingerprint, load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.objectives.sft import SupervisedFineTuning
    from anima.train.engine import Engine

    compute = Compute(torch.device("cpu"), torch.float32, "test")
    base = load_base(ModelConfig(model_name_or_path=model_dir), compute)
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=compute.dtype, seed=1), "all")
    parameters = list(trainable_parameters(network).values())
    engine = Engine(network, torch.optim.SGD(parameters, lr=1.0), ZERO_2, read_ranks(), fingerprint)
    engine.train_mode()
    batch, weight = collate(sequences()), torch.ones(())
    with pytest.raises(RuntimeError, match="in the midst of a step"):
        stop_within(engine, SupervisedFineTuning()(engine, batch).loss_sum)
    left = any(parameter.grad is not None for parameter in parameters)
    with engine.accumulating():
        engine.backward(SupervisedFineTuning()(engine, batch).loss_sum, weight)
        engine.spoil()
    skipped = engine.step(1.0).skipped
    with engine.accumulating():
        engine.backward(SupervisedFineTuning()(engine, batch).loss_sum, weight)
    return left, skipped, engine.step(0.0).grad_norm


def test_a_step_that_fails_or_is_skipped_leaves_nothing_for_the_next(run_ranks: RunRanks, tiny_llama_dir: Path) -> None:
    (left, skipped, norm), (_, _, other) = run_ranks(failing_step, 2, str(tiny_llama_dir))
    assert (left, skipped) == (False, True)
    alone = run_ranks(failing_step, 1, str(tiny_llama_dir))[0][2]
    assert norm == other == pytest.approx(2 * alone, rel=1e-6)  # a step of the same rows twice
    assert alone > 0


def plain_gradient(model_dir: str) -> tuple[torch.Tensor, float]:
    """The same step by stock transformers, PEFT and autograd: no packing, no DeepSpeed, one mean over all tokens."""
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from anima.config.schema import LoraConfig
    from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    model = attach_lora(base, LoraConfig(lora_r=16), dtype=torch.float32, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in lora_b_parameters(model).values():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.train()
    total, count = torch.zeros(()), 0
    for row in sequences():
        ids, labels = (torch.from_numpy(values.astype(np.int64)) for values in (row.input_ids, row.labels))
        logits = model(input_ids=ids[None]).logits[0]
        total = total + F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    gradients = [p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]
    return torch.cat(gradients), float(total / count)


def test_the_gradient_is_that_of_the_plain_mean_over_all_tokens(run_ranks: RunRanks, tiny_llama_dir: Path) -> None:
    ours = run_ranks(gradient, 2, str(tiny_llama_dir), "float32", 80, True)[0]
    expected, loss = plain_gradient(str(tiny_llama_dir))
    assert ours["loss"] == pytest.approx(loss, rel=1e-6)
    assert (ours["gradient"] - expected).norm() / expected.norm() < 1e-5
