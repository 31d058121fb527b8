"""Watches a run's numbers: gradients that are not finite, losses that leap. Decides, and says so; saves nothing."""

import json
import math
import statistics
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anima.errors import TrainingError

MAX_SKIPPED_IN_A_ROW = 5
"""Steps with gradients that are not finite before the run stops."""
SPIKE_SIGMAS = 6.0
"""Distance from the mean of the last losses, in their standard deviations, that is worth a warning."""
_MIN_LOSSES, _WINDOW = 20, 100


class Health:
    """What the last steps looked like.

    Attributes:
        skipped: Steps of the run without an update.
        grad_norms: Gradient norms before clipping of the last 100 steps.
    """

    def __init__(self) -> None:
        """A healthy start."""
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.grad_norms: deque[float] = deque(maxlen=_WINDOW)
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def step_done(self, grad_norm: float, *, skipped: bool) -> None:
        """Count a step."""
        self.grad_norms.append(grad_norm)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.skipped += skipped

    def check_skips(self, step: int, report: Path, last_good: Path | None) -> None:
        """Stop a run that only skips.

        Raises:
            TrainingError: too many steps in a row had gradients that are not finite.
        """
        if self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            return
        fix = "lower --learning_rate, look at these rows, or try --compute_dtype fp32"
        raise TrainingError(
            f"gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row",
            where=f"step {step}",
            got=f"rows in {report}; last good checkpoint: {last_good or 'none (--save_steps)'}",
            fix=fix + (f"; then go on by --resume {last_good}" if last_good else ""),
        )

    def leap(self, loss: float) -> str | None:
        """Take note of a loss; words for one that is far above the last ones."""
        known = [value for value in self._losses if math.isfinite(value)]
        self._losses.append(loss)
        if len(known) < _MIN_LOSSES or not math.isfinite(loss):
            return None
        mean, deviation = statistics.fmean(known), statistics.stdev(known)
        if loss <= mean + SPIKE_SIGMAS * max(deviation, 1e-3 * abs(mean)):
            return None
        norms = [norm for norm in self.grad_norms if math.isfinite(norm)]
        usual = f", gradient norm {norms[-1]:.3g}, usually {statistics.median(norms):.3g}" if norms else ""
        return f"the loss leapt to {loss:.4f} from a mean of {mean:.4f} (deviation {deviation:.4f}){usual}"

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "grad_norms": [_or_none(norm) for norm in self.grad_norms],
            "losses": [_or_none(loss) for loss in self._losses],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Health":
        """What `to_json` gave."""
        health = cls()
        health.skipped, health.skipped_in_a_row = values["skipped"], values["skipped_in_a_row"]
        health.grad_norms.extend(_number(norm) for norm in values["grad_norms"])
        health._losses.extend(_number(loss) for loss in values["losses"])
        return health


def write_report(path: Path, step: int, rows: Sequence[str], losses_by_rank: Sequence[float], health: Health) -> None:
    """What went into a step that was not finite: rows by file and line, never their text.

    Raises:
        OSError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    norms = [str(norm) if not math.isfinite(norm) else norm for norm in health.grad_norms]
    bad_ranks = [rank for rank, loss in enumerate(losses_by_rank) if not math.isfinite(loss)]
    values = {"step": step, "ranks_with_a_loss_not_finite": bad_ranks, "rows": list(rows), "grad_norms": norms}
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
