"""What a run has seen: its history for the summary, and the sums since the last line of metrics.

Both go into checkpoints, so that the first line after a resume is the one that an uninterrupted run would have written.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anima import distributed
from anima.objectives.objective import Objective
from anima.tracking.sample import Sample
from anima.train.health import Health
from anima.train.metrics import MetricSums

COUNTS = "counts"


@dataclass
class History:
    """What the loop has seen so far; becomes the run's summary."""

    tokens: int = 0
    supervised_tokens: int = 0
    sequences: int = 0
    training_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    eval_metrics: list[dict[str, float]] = field(default_factory=list)
    samples: list[tuple[int, list[Sample]]] = field(default_factory=list)
    health: Health = field(default_factory=Health)

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; of the losses only the ends, which the summary shows."""
        ends = self.losses if len(self.losses) < 2 else [self.losses[0], self.losses[-1]]
        return {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "sequences": self.sequences,
            "training_seconds": self.training_seconds,
            "losses": [loss if math.isfinite(loss) else None for loss in ends],
            "eval_losses": [[step, loss if math.isfinite(loss) else None] for step, loss in self.eval_losses],
            "eval_metrics": [
                {name: value for name, value in metrics.items() if math.isfinite(value)}
                for metrics in (self.eval_metrics[:1] + self.eval_metrics[1:][-1:])
            ],
            "samples": [[step, [vars(sample) for sample in samples]] for step, samples in self.samples],
            "health": self.health.to_json(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "History":
        """What `to_json` gave."""
        return cls(
            tokens=values["tokens"],
            supervised_tokens=values["supervised_tokens"],
            sequences=values["sequences"],
            training_seconds=values["training_seconds"],
            losses=[math.nan if loss is None else loss for loss in values["losses"]],
            eval_losses=[(step, math.nan if loss is None else loss) for step, loss in values["eval_losses"]],
            eval_metrics=[dict(metrics) for metrics in values["eval_metrics"]],
            samples=[(step, [Sample(**sample) for sample in samples]) for step, samples in values["samples"]],
            health=Health.from_json(values["health"]),
        )


class Meter:
    """Loss, tokens and time since the last line of metrics.

    Tokens are those of the data: both sides of a pair count whole, though the prompt they share is computed once, so
    that throughput compares with runs that compute it twice. Budgets and memory count what is computed.
    """

    def __init__(self, device: torch.device) -> None:
        """Start the clock."""
        self.sums = MetricSums()
        self._device = device
        self._counts = [0, 0, 0]
        self._seconds = 0.0
        self._steps = 0
        self._started = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock: what follows (evaluation, saving) is not training."""
        self._seconds += time.perf_counter() - self._started

    def go_on(self) -> None:
        """Training again."""
        self._started = time.perf_counter()

    def count(self, micro_batches: Sequence[Any], objective: Objective[Any]) -> None:
        """Count one step of this rank; fillers carry no weight and do not count."""
        real = [batch for batch in micro_batches if objective.weight(batch)]
        self._counts[0] += sum(batch.num_tokens for batch in real)
        self._counts[1] += sum(batch.num_scored for batch in real)
        self._counts[2] += sum(batch.num_examples for batch in real)
        self._steps += 1

    def read(self) -> tuple[dict[str, float], list[int], float, int]:
        """Means, (tokens, scored tokens, sequences), seconds and steps over all ranks since the last reading."""
        means = self.sums.reduce()
        counts = distributed.sum_over_ranks(torch.tensor(self._counts, device=self._device)).tolist()
        now = time.perf_counter()
        seconds, steps = self._seconds + now - self._started, self._steps
        self._counts, self._steps, self._seconds, self._started = [0, 0, 0], 0, 0.0, now
        return means, counts, seconds, steps

    def export(self) -> dict[str, Tensor]:
        """What this rank has summed since the last reading, for a checkpoint."""
        return self.sums.export() | {COUNTS: torch.tensor([*self._counts, self._steps])}

    def restore(self, ranks: Sequence[Mapping[str, Tensor]]) -> None:
        """Take over what `export` gave: one rank's, or several ranks' added up."""
        for rank in ranks:
            *counts, steps = rank[COUNTS].tolist()
            self._counts = [mine + other for mine, other in zip(self._counts, counts, strict=True)]
            self._steps = max(self._steps, steps)
            self.sums.restore({name: pair for name, pair in rank.items() if name != COUNTS}, self._device)
