"""DeepSpeed ZeRO-2 behind a small face: forward, backward of a sum, step. The only user of deepspeed.

ZeRO averages gradients over ranks and reduces them after every backward pass, so scaling happens here, once,
before the backward pass. The number of micro-batches varies from step to step: we set the boundary ourselves.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from torch import Tensor, nn

from anima import distributed
from anima.distributed import Ranks
from anima.errors import ModelError
from anima.objectives.objective import PackedBatch


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        grad_norm: Global gradient norm before clipping.
        skipped: True if a gradient was not finite on some rank; then no parameter moved on any.
    """

    grad_norm: float
    skipped: bool


class Engine:
    """One optimizer over all ranks: gradients and optimizer state sharded, parameters replicated."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        ranks: Ranks,
        fingerprint: Callable[[nn.Module], str],
    ) -> None:
        """Hand `network` to DeepSpeed and prove that the frozen base came through unchanged.

        Args:
            network: Trainable parameters and frozen base; already on the device.
            optimizer: Client optimizer over the trainable parameters.
            settings: Merged DeepSpeed JSON.
            ranks: This process among the others.
            fingerprint: Hash of the frozen base as it computes.

        Raises:
            ModelError: the base differs between ranks, or DeepSpeed changed it.
        """
        self.ranks = ranks
        self.device = next(network.parameters()).device
        before = fingerprint(network)
        everywhere = distributed.gather_objects(before)
        if len(set(everywhere)) > 1:
            raise ModelError(
                "the ranks loaded different base models",
                where="--model_name_or_path",
                got=", ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(everywhere)),
                fix="give every node the same files, complete",
            )
        self._engine = _initialize(network, optimizer, settings, str(self.device.type))
        after = fingerprint(network)
        if after != before:
            raise ModelError("DeepSpeed changed the frozen base", got=after, allowed=before)
        self.base_fingerprint = before

    @property
    def network(self) -> nn.Module:
        """The module itself, for evaluation and generation."""
        module: nn.Module = self._engine.module
        return module

    def train_mode(self) -> None:
        """Dropout and recomputation on."""
        self._engine.train()

    def eval_mode(self) -> None:
        """Dropout and recomputation off."""
        self._engine.eval()

    @property
    def head_weight(self) -> Tensor:
        """Output head, (vocabulary, hidden)."""
        weight: Tensor = self._engine.module.head_weight
        return weight

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states of a micro-batch, (tokens, hidden): the engine is the policy that objectives see."""
        hidden: Tensor = self._engine(
            batch.input_ids, batch.position_ids, batch.cu_seqlens, document_lengths=batch.document_lengths
        )
        return hidden

    def backward(self, loss_sum: Tensor, weight: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of loss_sum / weight, where both are sums over the whole step.

        Args:
            loss_sum: Differentiable scalar of this micro-batch.
            weight: Scalar on the device: the step's weight over all ranks and micro-batches.
            last: True for the last micro-batch of the step on this rank.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss_sum * (self.ranks.world_size / weight), scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepOutcome:
        """Clip and update with `learning_rate`; the same on every rank."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        skipped = self._engine.skipped_steps > skipped_before
        return StepOutcome(float("nan") if norm is None else float(norm), skipped)

    def optimizer_state_bytes(self) -> int:
        """Bytes of optimizer state on this rank: moments, their scales, fp32 masters; shows that it is sharded."""
        zero = self._engine.optimizer
        masters = list(zero.single_partition_of_fp32_groups)
        states = [zero.optimizer.state.get(master, {}) for master in masters]
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in masters + moments)


def _initialize(
    network: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device_type: str
) -> Any:  # noqa: ANN401  (deepspeed is untyped)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device_type == "cpu":
        # Only serves inference, but is compiled at start (a minute; hangs for ever on a stale lock): DeepSpeed 0.19.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        model_parameters=[p for p in network.parameters() if p.requires_grad],
        config=settings,
    )
    return engine
