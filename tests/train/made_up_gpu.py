"""A made-up GPU around real passes of a tiny model: what they take in memory and time is made up, and so is its end.

The gauge is the seam: it sees which layers are recomputed and how many tokens a pass had, and says what that took. A
pass that would take more than there is raises, in the midst of its backward pass, what torch raises.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from conftest import ZERO_2

from anima.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
)
from anima.data.batching import collate, filler
from anima.data.encode import TokenSequence
from anima.distributed import read_ranks
from anima.model.base_model import fingerprint, load_base
from anima.model.compute import Compute
from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters
from anima.model.packed import PackedModel
from anima.objectives.sft import SupervisedFineTuning
from anima.train.engine import Engine
from anima.train.optimizer import build_optimizer

MB = 1_000_000
PER_TOKEN = {2: 10_000, 1: 40_000, 0: 70_000}
"""Bytes a token by recomputed layers of the two."""
BEFORE, ALWAYS = 5 * MB, 1 * MB
"""What is taken without a pass, and what any pass takes."""


class MadeUpGpu:
    """Engine and network on it, and its gauge: a pass takes 1 s and 1 ms a token, half as much again for each
    recomputed layer.

    Args:
        model_dir: A model of two layers.
        room: Bytes that it has; None for no GPU.
    """

    def __init__(self, model_dir: str, room: float | None) -> None:
        self.memory = math.inf if room is None else room
        self.tried: list[tuple[int, int]] = []
        """Recomputed layers and tokens of every pass."""
        compute = Compute(torch.device("cpu"), torch.float32, "test")
        base = load_base(ModelConfig(model_name_or_path=model_dir), compute)
        lora = attach_lora(base, LoraConfig(lora_r=16, lora_dropout=0.2), dtype=compute.dtype, seed=1)
        self.network = PackedModel(lora, "all")
        parameters = trainable_parameters(self.network).values()
        optimizer = build_optimizer(parameters, OptimizationConfig(learning_rate=1e-2))
        self.engine = Engine(self.network, optimizer, ZERO_2, read_ranks(), fingerprint)
        self.engine.train_mode()
        list(lora_b_parameters(self.network).values())[7].register_hook(self._last_straw)

    def recomputed(self) -> int:
        """Layers recomputed as a whole; the cheap parts of the others must be too."""
        layers = list(self.network.causal_lm.get_decoder().layers)
        cheap = [m.recompute_output for layer in layers for m in layer.modules() if hasattr(m, "recompute_output")]
        whole = sum(layer.gradient_checkpointing for layer in layers)
        assert sum(cheap) == len(cheap) // 2 * (2 - whole)
        return whole

    def _taken(self) -> float:
        layers, tokens = self.tried[-1]
        return BEFORE + ALWAYS + PER_TOKEN[layers] * tokens

    def _last_straw(self, gradient: torch.Tensor) -> None:
        if self.tried and self._taken() > self.memory:
            raise torch.OutOfMemoryError("made up")

    def allocated(self) -> int:
        return BEFORE

    def room(self) -> int:
        return int(self.memory) - BEFORE

    def start(self) -> None:
        pass

    def stop(self) -> tuple[int, float]:
        layers, tokens = self.tried[-1]
        return int(self._taken()), (1 + 0.001 * tokens) * (1 + 0.5 * layers)

    def host_speed(self) -> float:
        return 50e9


class Noted(SupervisedFineTuning):
    """Tells the GPU what is passed through it."""

    def __init__(self, gpu: MadeUpGpu) -> None:
        self._gpu = gpu

    def __call__(self, policy: Any, batch: Any) -> Any:
        self._gpu.tried.append((self._gpu.recomputed(), sum(batch.document_lengths)))
        return super().__call__(policy, batch)


class Rows:
    """48 sequences of 30, 60 and 90 tokens in turn, 2880 in all."""

    lengths = np.array([30, 60, 90] * 16, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> TokenSequence:
        ids = (10 + np.arange(self.lengths[index]) * (index + 3) % 200).astype(np.int32)
        return TokenSequence(ids, ids)

    def batch(self, indices: Sequence[int]) -> Any:
        return collate([self[int(index)] for index in indices])

    def filler(self) -> Any:
        return filler(self[0])

    def source(self, index: int) -> str:
        return f"rows:{index}"


def config_of(model_dir: str, given: int, packing: bool) -> Config:
    """Two steps of all rows each."""
    return Config(
        model=ModelConfig(model_name_or_path=model_dir),
        data=DataConfig(train_files=("none",), max_seq_length=90),
        batch=BatchConfig(global_batch_size=48, micro_batch_tokens=given, packing=packing),
        optimization=OptimizationConfig(recompute="auto", max_steps=2),
        output=OutputConfig(output_dir="none"),
    )
