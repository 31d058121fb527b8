"""Means over micro-batches, steps and ranks: summed on the device, reduced once when somebody looks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from anima import distributed
from anima.objectives.objective import MetricSum


class MetricSums:
    """Running (total, count) per metric on the device; no host synchronisation until `reduce`."""

    def __init__(self) -> None:
        """Start empty."""
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, metric: MetricSum) -> None:
        """Add one micro-batch's sum."""
        pair = torch.stack((metric.total.double(), metric.count.double()))
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self) -> dict[str, float]:
        """Means over everything added on all ranks since the last call; a metric nobody counted is left out.

        A collective: every rank calls it with the same metric names, at the same step.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = distributed.sum_over_ranks(torch.stack([self._sums[name] for name in names])).tolist()
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, table, strict=True) if count}

    def export(self) -> dict[str, Tensor]:
        """The running pairs of this rank in host memory, for a checkpoint."""
        return {name: pair.cpu() for name, pair in self._sums.items()}

    def restore(self, pairs: Mapping[str, Tensor], device: torch.device) -> None:
        """Add pairs that `export` gave."""
        for name, pair in pairs.items():
            moved = pair.to(device, copy=True)
            self._sums[name] = self._sums[name] + moved if name in self._sums else moved
