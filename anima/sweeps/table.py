"""The trials of a sweep as lines for a terminal, the best first. Computes nothing but the order."""

import math
from collections.abc import Sequence

from anima.sweeps.journal import Trial
from anima.sweeps.sweep_file import Sweep
from anima.tracking.terminal import pad, text_width


def measured(sweep: Sweep, trials: Sequence[Trial]) -> list[Trial]:
    """Finished trials with a metric, best first."""
    found = [trial for trial in trials if trial.state == "finished" and _is_number(trial.metric)]
    return sorted(found, key=lambda trial: sweep.sign * (trial.metric or 0.0))


def table_lines(sweep: Sweep, trials: Sequence[Trial]) -> list[str]:
    """The final table.

    Args:
        sweep: Whose trials; the parameters that vary are columns.
        trials: In any order.
    """
    varied = [parameter.name for parameter in sweep.parameters if parameter.varies]
    rows = [["trial", sweep.metric, *varied, "min", "state"]]
    best_first = measured(sweep, trials)
    for trial in [*best_first, *(trial for trial in trials if trial not in best_first)]:
        metric = "" if trial.metric is None else f"{trial.metric:.5g}"
        values = [_short(trial.parameters[name]) for name in varied]
        rows.append([str(trial.number), metric, *values, f"{trial.seconds / 60:.1f}", trial.state])
    widths = [max(text_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(pad(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _is_number(metric: float | None) -> bool:
    return metric is not None and math.isfinite(metric)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
