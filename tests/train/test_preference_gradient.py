"""The gradient of a step over pairs is that of the mean over all pairs: for any ranks, micro-batches and packing.

Real DeepSpeed ZeRO-2 over gloo and a real NF4 base, read off the fp32 masters as in test_engine.py; against stock
transformers and PEFT, which run each answer alone and find the reference by switching the adapter off.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ZERO_2, RunRanks

LENGTHS = ((3, 4, 30), (20, 11, 2), (9, 8, 9), (1, 25, 40), (14, 2, 6))
"""Prompt, chosen and rejected answer of each pair, tokens."""
BETA, SFT_WEIGHT = 0.3, 0.2


def pairs() -> list[Any]:
    """Ragged pairs of random tokens."""
    from anima.data.encode import IGNORE_INDEX, TokenSequence

    generator = np.random.default_rng(0)

    def side(prompt: Any, length: int) -> TokenSequence:
        ids = np.concatenate([prompt, generator.integers(5, 280, length)]).astype(np.int32)
        labels = ids.copy()
        labels[: len(prompt)] = IGNORE_INDEX
        return TokenSequence(ids, labels)

    prompts = [generator.integers(5, 280, length) for length, _, _ in LENGTHS]
    return [(side(p, chosen), side(p, rejected)) for p, (_, chosen, rejected) in zip(prompts, LENGTHS, strict=True)]


def move_lora(model: Any) -> None:
    """B matrices that are not zero, so that the policy is not its reference."""
    from anima.model.lora import lora_b_parameters

    generator = torch.Generator().manual_seed(2)
    for parameter in lora_b_parameters(model).values():
        parameter.data.normal_(0, 0.02, generator=generator)


def gradient(model_dir: str, budget: int, packing: bool) -> dict[str, Any]:
    """One step on this rank's part, with the reference's numbers from the network with its adapter off."""
    import torch.distributed as dist

    from anima.config.preference import PreferenceConfig
    from anima.config.schema import LoraConfig, ModelConfig
    from anima.data.batching import assign, collate_pairs, pair_filler
    from anima.distributed import read_ranks
    from anima.model.base_model import fingerprint, load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.objectives.preference import PreferenceOptimization, pair_logps
    from anima.train.engine import Engine
    from anima.train.metrics import MetricSums
    from anima.train.reference_pass import NetworkPolicy, Reference
    from anima.train.step import train_step

    ranks = read_ranks()
    base = load_base(ModelConfig(model_name_or_path=model_dir), Compute(torch.device("cpu"), torch.float32, "test"))
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=16), dtype=torch.float32, seed=1), "all")
    move_lora(network)
    rows = pairs()
    reference = Reference("", None, adapter_off=True, equals_start=False)
    with reference.in_place(network), torch.no_grad():
        said = pair_logps(NetworkPolicy(network), collate_pairs(rows))
    known = torch.stack((said.chosen, said.rejected), 1)
    parameters = list(trainable_parameters(network).values())
    engine = Engine(network, torch.optim.SGD(parameters, lr=1.0), ZERO_2, ranks, fingerprint)
    engine.train_mode()
    zero = engine._engine.optimizer
    before = zero.single_partition_of_fp32_groups[0].clone()
    lengths = [len(chosen) + len(rejected) for chosen, rejected in rows]
    shares = assign(lengths, world_size=ranks.world_size, micro_batch_tokens=budget, packing=packing)[ranks.rank]
    batches = [
        collate_pairs([rows[i] for i in part], known[part]) if part else pair_filler(rows[0][0], with_reference=True)
        for part in shares
    ]
    sums = MetricSums()
    objective = PreferenceOptimization(PreferenceConfig(beta=BETA, sft_weight=SFT_WEIGHT))
    train_step(engine, objective, batches, 1.0, sums)
    part = before - zero.single_partition_of_fp32_groups[0]
    parts = [torch.empty_like(part) for _ in range(ranks.world_size)]
    dist.all_gather(parts, part)
    metrics = sums.reduce()
    whole = torch.cat(parts)[: sum(parameter.numel() for parameter in parameters)]
    return {"gradient": whole, "metrics": metrics, "micro_batches": len(batches), "known": known}


def plain_gradient(model_dir: str) -> tuple[torch.Tensor, float, torch.Tensor]:
    """The same step by stock transformers, PEFT and autograd: one answer at a time, one mean over all pairs."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from anima.config.schema import LoraConfig
    from anima.model.lora import attach_lora, trainable_parameters

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
    move_lora(model)
    model.train()

    def logp(side: Any) -> torch.Tensor:
        ids, labels = (torch.from_numpy(values.astype(np.int64)) for values in (side.input_ids, side.labels))
        table = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1], dim=-1)
        scored = labels[1:] != -100
        return table.gather(1, ids[1:, None])[:, 0][scored].sum()

    with torch.no_grad(), model.disable_adapter():
        known = torch.tensor([[float(logp(side)) for side in pair] for pair in pairs()])
    total = torch.zeros(())
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(pairs(), known, strict=True):
        pc = logp(chosen)
        total = total - torch.log(torch.sigmoid(BETA * ((pc - ref_chosen) - (logp(rejected) - ref_rejected))))
        total = total - SFT_WEIGHT * pc / int((chosen.labels != -100).sum())
    (total / len(LENGTHS)).backward()
    gradients = [p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]
    return torch.cat(gradients), float(total.detach()) / len(LENGTHS), known


@pytest.mark.parametrize(("world_size", "budget", "packing"), [(1, 500, True), (2, 90, True), (2, 500, False)])
def test_the_gradient_is_that_of_the_plain_mean_over_all_pairs(
    run_ranks: RunRanks, tiny_llama_dir: Path, world_size: int, budget: int, packing: bool
) -> None:
    expected, loss, known = plain_gradient(str(tiny_llama_dir))
    ranks = run_ranks(gradient, world_size, str(tiny_llama_dir), budget, packing)
    assert ranks[0]["micro_batches"] == {500: 1 if packing else 3, 90: 2}[budget]
    for ours in ranks:
        torch.testing.assert_close(ours["known"], known, rtol=1e-5, atol=1e-4)
        assert ours["metrics"]["loss"] == pytest.approx(loss, rel=1e-5)
        assert ours["metrics"]["kl"] > 0
        assert (ours["gradient"] - expected).norm() / expected.norm() < 1e-4
