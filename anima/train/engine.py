"""DeepSpeed ZeRO-2 behind a small face: forward, backward of a sum, step. The only user of deepspeed.

The gradients of a step's micro-batches add up on their rank in fp32 and travel once, after the last one, as their mean
over ranks (gradients.py); so the scaling to a mean over the step happens here, before each backward pass.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from anima.train import optimizer_state
from anima.train.gradients import Gradients
from anima.train.optimizer import code_maps, is_paged, moment_bytes, put_back, take_out, will_be_paged
from anima.train.optimizer_state import GroupState, RankState

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FLUSH = "_flush_coalesced_reduction_zero12"
"""Where DeepSpeed 0.19 reduces the gradients of a step that `coalesce_grad_reduction` has held back."""
_SMALL_FILES_BYTES = 32 << 20
"""Tokenizer, records, random states, scales: more than they take."""


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did.

    Attributes:
        grad_norm: Global gradient norm before clipping.
        skipped: True if a gradient was not finite on some rank; then no parameter moved on any.
        agreed: Sums over all ranks of the flags that the step was given.
    """

    grad_norm: float
    skipped: bool
    agreed: tuple[float, ...] = ()


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
        travel = _FORMATS[settings.get("communication_data_type", "fp32")]
        self._gradients = Gradients(self._engine.optimizer, ranks, travel)
        if not hasattr(self._engine, _FLUSH):
            raise ModelError("this DeepSpeed reduces gradients elsewhere", got=deepspeed.__version__, allowed="0.19")
        setattr(self._engine, _FLUSH, lambda _: self._gradients.reduce())
        # DeepSpeed makes every parameter a view of its flat vector again after each step, which it never ceased to be.
        self._engine.optimizer._update_model_bit16_weights = lambda _: None

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
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            document_lengths=batch.document_lengths,
            shared_prompts=batch.shared_prompts,
        )
        return hidden

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """All backward passes of a step happen in here; when it ends well, their gradient is reduced over the ranks."""
        self._gradients.begin()
        with self._engine.coalesce_grad_reduction():
            try:
                yield
            except BaseException:
                self._gradients.drop()  # the other ranks would not answer
                raise

    def spoil(self) -> None:
        """Make the gradients of this step NaN, within `accumulating`: then `step` skips it."""
        self._gradients.spoil()

    def backward(self, loss_sum: Tensor, weight: Tensor) -> None:
        """Add the gradient of loss_sum / weight, where both are sums over the whole step, within `accumulating`.

        Args:
            loss_sum: Differentiable scalar of this micro-batch.
            weight: Scalar on the device: the step's weight over all ranks and micro-batches.
        """
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

    def export_optimizer(self) -> list[GroupState]:
        """Masters and moments of all ranks in host memory, on rank 0; elsewhere an empty list. A collective.

        The tensors are copies: training can go on while they are written.
        """
        zero, groups = self._engine.optimizer, []
        for number, master in enumerate(zero.single_partition_of_fp32_groups):
            mine = take_out(master, zero.optimizer.state.get(master, {}))
            vectors = {name: distributed.gather_to_main(t, self.device) for name, t in mine.vectors.items()}
            scales = {name: distributed.gather_to_main(t, self.device) for name, t in mine.scales.items()}
            if self.ranks.is_main:
                maps = {name: codes.cpu().clone() for name, codes in mine.maps.items()}
                parts = [
                    RankState(
                        {name: parts[rank] for name, parts in vectors.items()},
                        {name: parts[rank] for name, parts in scales.items()},
                        maps,
                        mine.scalars,
                    )
                    for rank in range(self.ranks.world_size)
                ]
                groups.append(optimizer_state.join(self._parameters(number), parts))
        return groups

    def import_optimizer(self, groups: list[GroupState]) -> bool:
        """Take over a saved state, on any number of ranks, and set the adapter to its masters. A collective.

        Returns:
            True if every moment is exactly what was saved; False if some blocks had to be rounded anew.

        Raises:
            CheckpointError: it is the state of another adapter.
        """
        zero, exact = self._engine.optimizer, True
        for number, (master, group) in enumerate(zip(zero.single_partition_of_fp32_groups, groups, strict=True)):
            optimizer_state.check_parameters(group, self._parameters(number))
            maps = code_maps(zero.optimizer, master.numel())
            state, same = optimizer_state.cut(group, master.numel(), self.ranks.rank, maps)
            put_back(zero.optimizer, master, state)
            exact = exact and same
        zero.update_lp_params()
        return all(distributed.gather_objects(exact))

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on disk: masters, moments and the adapter of all ranks, and small files."""
        zero, total = self._engine.optimizer, _SMALL_FILES_BYTES
        for master, adapter in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups_flat, strict=True):
            moments = 2 if code_maps(zero.optimizer, master.numel()) else 8
            total += adapter.numel() * (4 + moments + adapter.element_size())
        return total

    def missing_moment_bytes(self, *, paged: bool) -> int:
        """Bytes that this rank's moments will take from the first step on; 0 once they are there.

        Args:
            paged: Of those that can leave the device, which they do when it is full, at a price; or of the others.
        """
        zero, missing = self._engine.optimizer, 0
        for master in zero.single_partition_of_fp32_groups:
            if not zero.optimizer.state.get(master) and will_be_paged(zero.optimizer, master) is paged:
                missing += moment_bytes(zero.optimizer, master)
        return missing

    def paged_state(self) -> bool:
        """True if this rank's moments lie in memory that can move between GPU and host."""
        zero = self._engine.optimizer
        return any(is_paged(zero.optimizer, master) for master in zero.single_partition_of_fp32_groups)

    def _parameters(self, number: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a parameter group in the order of its flat vector."""
        names = {id(parameter): name for name, parameter in self._engine.module.named_parameters()}
        return [(names[id(p)], tuple(p.shape)) for p in self._engine.optimizer.bit16_groups[number]]

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
