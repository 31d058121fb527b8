"""Drawings of the report as SVG and HTML text: ratings with intervals, and the table of who beats whom."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, ROW, TOP, RIGHT = 900, 34, 16, 190
LABEL_CHAR = 9.0
"""Width of a letter of the labels, pixels."""


def rating_plot(
    ratings: Mapping[str, float], intervals: Mapping[str, Sequence[float]], others: Mapping[str, Mapping[str, float]]
) -> str:
    """Points with intervals, best first, one line a model.

    Args:
        ratings: The points.
        intervals: Low and high by model; a model without one gets none.
        others: Ratings by other methods, by the method's name, as small marks.
    """
    ranked = sorted(ratings, key=lambda name: -ratings[name])
    left = min(310.0, 34 + LABEL_CHAR * max(map(len, ranked)))
    values = [*ratings.values(), *(value for pair in intervals.values() for value in pair)]
    values += [value for other in others.values() for value in other.values()]
    step = _step(max(values) - min(values))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    high = high if high > low else low + step

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (WIDTH - left - RIGHT)

    bottom = TOP + ROW * len(ranked)
    parts = [f'<svg class="plot" viewBox="0 0 {WIDTH} {bottom + 30}" role="img" aria-label="Ratings with intervals">']
    for tick in range(round((high - low) / step) + 1):
        at, value = x(low + tick * step), low + tick * step
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 20}">{value:g}</text>')
    for place, name in enumerate(ranked):
        y = TOP + ROW * (place + 0.5)
        value = ratings[name]
        parts.append(f'<text class="name" x="{left - 14:.1f}" y="{y + 4:.1f}">{html.escape(_short(name))}</text>')
        note = f"{value:.0f}"
        if name in intervals:
            start, end = intervals[name]
            parts.append(f'<line class="interval" x1="{x(start):.1f}" x2="{x(end):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
            note += f"  ({start:.0f} … {end:.0f})"
        for kind, (method, values_of) in enumerate(others.items()):
            title = f"<title>{html.escape(f'{name}, {method}: {values_of[name]:.0f}')}</title>"
            at = x(values_of[name])
            parts.append(f'<path class="mark{kind}" d="M{at:.1f} {y - 7:.1f}v14">{title}</path>')
        title = f"<title>{html.escape(f'{name}: {value:.1f}')}</title>"
        parts.append(f'<circle class="point" cx="{x(value):.1f}" cy="{y:.1f}" r="5.5">{title}</circle>')
        parts.append(f'<text class="value" x="{WIDTH - RIGHT + 14}" y="{y + 4:.1f}">{note}</text>')
    return "".join([*parts, "</svg>"])


def heat_map(head_to_head: Mapping[str, Mapping[str, Mapping[str, Any]]], ranked: Sequence[str]) -> str:
    """A table: how often the model of the row beat that of the column; blue wins, red loses."""
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in ranked)
    rows = []
    for one in ranked:
        cells = []
        for other in ranked:
            record = head_to_head.get(one, {}).get(other)
            if one == other or record is None or record["rate"] is None:
                cells.append('<td class="empty"></td>')
                continue
            rate = record["rate"]
            title = f"{one} against {other}: {record['wins']} won, {record['ties']} tied, {record['losses']} lost"
            matches = record["wins"] + record["ties"] + record["losses"]
            cells.append(
                f'<td style="{heat(rate)}" title="{html.escape(title)}">{rate:.0%}<small>{matches}</small></td>'
            )
        rows.append(f'<tr><th scope="row">{html.escape(one)}</th>{"".join(cells)}</tr>')
    return f'<table class="heat"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def heat(rate: float) -> str:
    """Background of a share: red at 0, none at a half, blue at 1."""
    strength = abs(rate - 0.5) * 2
    colour = "37, 99, 235" if rate > 0.5 else "220, 60, 50"
    return f"background: rgba({colour}, {0.62 * strength:.2f})"


def _short(name: str) -> str:
    return name if len(name) <= 30 else name[:29] + "…"


def _step(span: float) -> float:
    """A round distance of grid lines that gives about six of them."""
    if span <= 0:
        return 50.0
    power: float = 10.0 ** math.floor(math.log10(span / 6))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 6)
