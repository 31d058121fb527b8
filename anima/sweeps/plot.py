"""The metric of all finished trials against each parameter that varies, as a picture. The only user of matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from anima.sweeps.journal import Trial
from anima.sweeps.sweep_file import RANGES, Parameter, Sweep
from anima.sweeps.table import measured

COLUMNS = 3
POINT, BEST = "#2563eb", "#dc2626"


def draw(sweep: Sweep, trials: Sequence[Trial], path: Path) -> bool:
    """Write the picture; False if there is nothing to show.

    Args:
        sweep: Whose trials.
        trials: In any order; those without a metric are left out.
        path: A .png or .svg file.
    """
    shown = measured(sweep, trials)
    varied = [parameter for parameter in sweep.parameters if parameter.varies]
    if not shown or not varied:
        return False
    columns = 2 if len(varied) in (2, 4) else min(COLUMNS, len(varied))
    rows = -(-len(varied) // columns)
    size = (4.2 * columns, 3.4 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    axes = list(grid.flat)
    for parameter, one in zip(varied, axes, strict=False):
        _panel(one, parameter, shown)
    for index, one in enumerate(axes):
        one.set_visible(index < len(varied))
        if index % columns == 0:
            one.set_ylabel(sweep.metric)
    name = Path(sweep.path).name
    figure.suptitle(f"{name}: {len(shown)} trials, {sweep.goal} {sweep.metric}; the star is trial {shown[0].number}")
    figure.savefig(path, dpi=130)
    return True


def _panel(axes: Axes, parameter: Parameter, shown: Sequence[Trial]) -> None:
    """One parameter: a scale for numbers of a range, places side by side for choices; the best trial stands out."""
    values = [trial.parameters[parameter.name] for trial in shown]
    metrics = [trial.metric or 0.0 for trial in shown]
    if parameter.choices:
        values = [parameter.choices.index(value) for value in values]
        axes.set_xticks(range(len(parameter.choices)), [str(choice) for choice in parameter.choices])
        axes.set_xlim(-0.5, len(parameter.choices) - 0.5)
    elif parameter.distribution in RANGES:
        axes.set_xlim(*_limits(axes, parameter))
    axes.scatter(values[1:], metrics[1:], s=28, color=POINT, alpha=0.75)
    axes.scatter(values[:1], metrics[:1], s=110, color=BEST, marker="*", zorder=3)
    axes.set_xlabel(parameter.name)
    axes.grid(alpha=0.25)


def _limits(axes: Axes, parameter: Parameter) -> tuple[float, float]:
    """A little more than the range that trials are chosen from, so that a best value at its border is seen as such."""
    low, high = parameter.low, parameter.high
    if "log" not in parameter.distribution:
        return low - 0.04 * (high - low), high + 0.04 * (high - low)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    return low * (low / high) ** 0.04, high * (high / low) ** 0.04
