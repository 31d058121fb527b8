"""On a GPU: between the start of a step and its update the host never waits for the device."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ZERO_2

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    from anima import distributed

    distributed.start(distributed.Ranks(), torch.device("cuda", 0))  # once: DeepSpeed remembers its groups
    yield
    distributed.stop()


@pytest.fixture(autouse=True)
def _warned_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def batches(objective: str) -> list[Any]:
    from anima.data.batching import collate, collate_pairs
    from anima.data.encode import TokenSequence

    def sequence(length: int, seed: int) -> TokenSequence:
        ids = np.random.default_rng(seed).integers(3, 200, length).astype(np.int32)
        ids[:20] = np.arange(20) + 3  # what the sides of a pair share
        labels = ids.copy()
        labels[:24] = -100
        return TokenSequence(ids, labels)

    if objective == "sft":
        return [collate([sequence(60 + seed, seed), sequence(40, seed + 9)]) for seed in range(3)]
    pairs = [[(sequence(60 + seed, seed), sequence(50, seed + 9))] for seed in range(3)]
    return [collate_pairs(pair, torch.zeros(1, 2)) for pair in pairs]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("form", ["bf16", "fp8_backward", "fp8"])
@pytest.mark.parametrize("policy", ["none", "cheap", "all", "1", "cheap/1"])
def test_forward_and_backward_are_told_in_one_go(
    objective: str, form: str, policy: str, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anima import distributed
    from anima.config.preference import PreferenceConfig
    from anima.config.schema import LoraConfig, ModelConfig, OptimizationConfig
    from anima.model import offload
    from anima.model.base_model import fingerprint, load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, compute_in_fp8, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.objectives.preference import PreferenceOptimization
    from anima.objectives.sft import SupervisedFineTuning
    from anima.train.engine import Engine
    from anima.train.metrics import MetricSums
    from anima.train.optimizer import build_optimizer
    from anima.train.step import train_step

    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    compute = Compute(torch.device("cuda", 0), torch.bfloat16, "test")
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), compute)
    adapted = attach_lora(base, LoraConfig(lora_r=16), dtype=torch.bfloat16, seed=3)
    if form != "bf16":
        compute_in_fp8(adapted, forward=form == "fp8")
    network = PackedModel(adapted, policy).train()
    optimizer = build_optimizer(list(trainable_parameters(network).values()), OptimizationConfig())
    engine = Engine(network, optimizer, {**ZERO_2, "bf16": {"enabled": True}}, distributed.Ranks(), fingerprint)
    loss: Any = SupervisedFineTuning() if objective == "sft" else PreferenceOptimization(PreferenceConfig())
    rows = batches(objective)
    train_step(engine, loss, rows, 1e-4, MetricSums())  # compiles, and creates the optimizer's state
    update = engine.step

    def updated(learning_rate: float) -> Any:
        torch.cuda.set_sync_debug_mode("default")
        return update(learning_rate)

    monkeypatch.setattr(engine, "step", updated)
    torch.cuda.set_sync_debug_mode("error")
    train_step(engine, loss, rows, 1e-4, MetricSums())
