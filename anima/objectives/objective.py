"""The contract between a loss and the training step.

A step is defined over all ranks: its gradient is that of sum(loss_sum) / sum(weight), whatever the
micro-batches and ranks. So an objective returns local sums and never divides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from anima.data.shared_prompts import SharedPrompts

Batch = TypeVar("Batch", contravariant=True)


class PackedBatch(Protocol):
    """A packed row, as the network needs it."""

    @property
    def input_ids(self) -> Tensor:
        """(1, T)."""
        ...

    @property
    def position_ids(self) -> Tensor:
        """(1, T), restarting at every document, or going on from the prompt that it shares."""
        ...

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (documents + 1,), cumulative lengths."""
        ...

    @property
    def document_lengths(self) -> tuple[int, ...]:
        """The same boundaries as lengths, on the host."""
        ...

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """Which documents go on from the beginning of the document before them; None if none does."""
        ...


class Policy(Protocol):
    """The network that is trained, as objectives see it."""

    @property
    def head_weight(self) -> Tensor:
        """Output head, (vocabulary, hidden)."""
        ...

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Hidden states of a packed micro-batch, (tokens, hidden)."""
        ...


@dataclass(frozen=True)
class MetricSum:
    """A mean in the making: `total` over `count`, summed over micro-batches and ranks before dividing."""

    total: Tensor
    count: Tensor


@dataclass(frozen=True)
class ObjectiveOutput:
    """Result for one micro-batch.

    Attributes:
        loss_sum: Differentiable scalar: the sum (not the mean) over what the step averages.
        metrics: Detached sums by metric name, on the device.
    """

    loss_sum: Tensor
    metrics: Mapping[str, MetricSum]


class Objective(Protocol[Batch]):
    """A loss over micro-batches of one type."""

    name: str

    def weight(self, batch: Batch) -> int:
        """What the micro-batch counts in the step's mean: scored tokens, or pairs."""
        ...

    def __call__(self, policy: Policy, batch: Batch) -> ObjectiveOutput:
        """Loss and metrics of one micro-batch."""
        ...
