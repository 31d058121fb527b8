"""The rehearsal of the heaviest micro-batch changes no number of the training after it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import ZERO_2, RunRanks

from anima.model import recompute
from anima.train.rehearsal import out_of_memory
from anima.train.run import Plan


def train_twice(model_dir: str) -> list[dict[str, Any]]:
    """Two steps with dropout and 8-bit moments, without a rehearsal before and with one."""
    import numpy as np

    from anima.config.schema import LoraConfig, ModelConfig, OptimizationConfig
    from anima.data.batching import collate
    from anima.data.encode import TokenSequence
    from anima.distributed import read_ranks
    from anima.model.base_model import fingerprint, load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.objectives.sft import SupervisedFineTuning
    from anima.train.engine import Engine
    from anima.train.metrics import MetricSums
    from anima.train.optimizer import build_optimizer
    from anima.train.rehearsal import rehearse
    from anima.train.run import Plan
    from anima.train.step import GradientProbe, train_step

    results = []
    for rehearsed in (False, True):
        compute = Compute(torch.device("cpu"), torch.float32, "test")
        base = load_base(ModelConfig(model_name_or_path=model_dir), compute)
        lora = attach_lora(base, LoraConfig(lora_r=16, lora_dropout=0.2), dtype=compute.dtype, seed=1)
        network = PackedModel(lora, "all")
        optimizer = build_optimizer(trainable_parameters(network).values(), OptimizationConfig(learning_rate=1e-2))
        engine = Engine(network, optimizer, ZERO_2, read_ranks(), fingerprint)
        engine.train_mode()
        ids = np.arange(10, 40, dtype=np.int32)
        batches = [collate([TokenSequence(ids[:length], ids[:length])]) for length in (30, 12)]
        probe = GradientProbe(lora_b_parameters(network))
        said: list[str] = []
        if rehearsed:
            rehearse(  # type: ignore[arg-type]
                SimpleNamespace(
                    engine=engine,
                    objective=SupervisedFineTuning(),
                    steps=SimpleNamespace(heaviest=lambda count, num_train_epochs, heavy=batches[0]: heavy),
                    plan=Plan(30, "all"),
                    fitted=SimpleNamespace(smaller=None),
                    num_steps=2,
                    num_train_epochs=None,
                    probe=probe,
                    progress=SimpleNamespace(message=said.append),
                )
            )
            assert not probe._seen.any()
        sums = MetricSums()
        outcomes = [train_step(engine, SupervisedFineTuning(), batches, 1e-2, sums) for _ in range(2)]
        probe.check()
        state = engine.export_optimizer()[0]
        results.append(
            {
                "said": said,
                "outcomes": [(outcome.grad_norm, outcome.skipped) for outcome in outcomes],
                "loss": sums.reduce(),
                "vectors": state.vectors,
                "scales": state.scales,
            }
        )
    return results


def test_a_rehearsal_changes_nothing(run_ranks: RunRanks, tiny_llama_dir: Path) -> None:
    plain, rehearsed = run_ranks(train_twice, 1, str(tiny_llama_dir))[0]
    assert rehearsed["said"] == ["heaviest micro-batch of the run: 30 tokens; it fits"]
    assert plain["vectors"]["state1"].dtype == torch.uint8
    assert rehearsed["outcomes"] == plain["outcomes"]
    assert not any(skipped for _, skipped in plain["outcomes"])
    assert rehearsed["loss"] == plain["loss"]
    for kind in ("vectors", "scales"):
        assert rehearsed[kind].keys() == plain[kind].keys()
        assert all(torch.equal(rehearsed[kind][name], plain[kind][name]) for name in plain[kind])


def test_a_full_host_is_named_instead_of_the_device() -> None:
    """Nothing else tells: the device has room, and the message's other advice is about the device."""
    network = torch.nn.Linear(1, 1)
    memory = SimpleNamespace(refusal="no more than 80% of 9.0 GiB free of the 64.0 GiB that this job may use")
    setattr(network, recompute._HOST_MEMORY, memory)
    engine = SimpleNamespace(network=network, device=torch.device("cpu"), ranks=SimpleNamespace(rank=3))
    run = SimpleNamespace(
        engine=engine,
        plan=Plan(30, "cheap/4"),
        config=SimpleNamespace(
            data=SimpleNamespace(sequence_limit=8), optimization=SimpleNamespace(recompute="cheap/4")
        ),
    )
    batches = [SimpleNamespace(document_lengths=[20, 10])]
    message = str(out_of_memory(run, batches, "in step 4"))  # type: ignore[arg-type]
    assert "--recompute cheap/4; no more than 80% of 9.0 GiB free of the 64.0 GiB" in message
    assert "fix:     fewer layers behind the / of --recompute" in message
    memory.refusal = None
    assert "layers behind" not in str(out_of_memory(run, batches, "in step 4"))  # type: ignore[arg-type]
