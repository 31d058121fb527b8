"""Samples and figures as lines for a terminal, with colours or without. Knows nothing of how they were made."""

from collections.abc import Sequence
from itertools import groupby

from anima.inspection.samples import TEMPLATE, Piece, Sample, learned_share
from anima.inspection.stats import Histogram, Stats, facts, table

_ROLE_COLOURS = {"system": "35", "user": "36", "assistant": "32", "tool": "33", TEMPLATE: "90", "raw": "33"}
BAR = 48
"""Columns of the longest bar."""


class Painter:
    """Wraps text in colours, or leaves it as it is.

    Args:
        colours: Whether the terminal shows them.
    """

    def __init__(self, colours: bool) -> None:
        self.colours = colours

    def __call__(self, text: str, *codes: str) -> str:
        """The text in the colours of these ANSI codes, line by line, so that pagers keep them."""
        if not self.colours or not text:
            return text
        start, end = f"\x1b[{';'.join(codes)}m", "\x1b[0m"
        return "\n".join(f"{start}{line}{end}" if line else line for line in text.split("\n"))


def sample_lines(sample: Sample, paint: Painter, *, boundaries: bool) -> list[str]:
    """A sample: a line of facts, then its text; learned text is bright and marked, the rest is dim.

    Args:
        sample: The sample.
        paint: Colours.
        boundaries: Whether to set the tokens apart.
    """
    facts_ = f"{sample.layout}, {sample.tokens:,} tokens, {sample.learned:,} learned ({learned_share(sample):.0%})"
    status = paint(sample.status, "32" if sample.kept and sample.status == "kept" else "33")
    lines = [f"{paint(sample.source, '1')}  {facts_}  {status}"]
    if sample.cut:
        lines.append(paint(f"[cut: {sample.cut!r}]", "9", "31"))
    text = ""
    for learned, block in groupby(sample.pieces, key=lambda piece: piece.learned):
        open_, close = ("⟦", "⟧") if learned and not paint.colours else ("", "")
        for role, group in groupby(block, key=lambda piece: piece.role):
            if role not in (TEMPLATE, "raw"):
                text += paint(f"[{role}{', learned' if learned else ''}]", "7", _ROLE_COLOURS[role])
            text += open_ + _pieces(list(group), paint, boundaries)
            open_ = ""
        text += close
    return [*lines, text]


def legend(paint: Painter) -> str:
    """What the colours mean."""
    parts = [paint(name, _ROLE_COLOURS[name]) for name in ("system", "user", "tool", TEMPLATE)]
    learned = paint("learned", "1", "32") if paint.colours else "⟦learned⟧"
    return f"{learned} · given: {' '.join(parts)} · {paint('<special token>', '30', '45')}"


def _pieces(pieces: Sequence[Piece], paint: Painter, boundaries: bool) -> str:
    """Pieces of one speaker; neighbours of one colour share its codes."""
    text = ""
    for codes, group in groupby(pieces, key=_codes):
        border = "\u2502" if boundaries else ""
        text += paint("".join(_visible(piece.text) + border * len(piece.ids) for piece in group), *codes)
    return text


def _codes(piece: Piece) -> tuple[str, ...]:
    if piece.special:
        return ("30", "42") if piece.learned else ("30", "45")
    if piece.learned:
        return ("1", "32")
    return ("2", _ROLE_COLOURS[TEMPLATE]) if piece.role == TEMPLATE else (_ROLE_COLOURS.get(piece.role, "37"),)


def _visible(text: str) -> str:
    """Control characters as escapes: a terminal would obey them."""
    return "".join(c if c in "\n\t" or not _is_control(c) else f"\\x{ord(c):02x}" for c in text)


def _is_control(letter: str) -> bool:
    return ord(letter) < 32 or 127 <= ord(letter) < 160


def stats_lines(stats: Stats, paint: Painter) -> list[str]:
    """Quantiles, figures and the histogram."""
    rows = table(stats)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines[0] = paint(lines[0], "1")
    return [*lines, "", *facts(stats), "", *histogram_lines(stats.histogram, stats.limits["total"], paint)]


def histogram_lines(found: Histogram, limit: int | None, paint: Painter) -> list[str]:
    """Bars of rows by total tokens; those that begin over the limit are marked."""
    most, total = max(1, *found.counts), max(1, sum(found.counts))
    width = len(f"{found.edges[-1]:,}")
    lines = [paint("rows by total tokens", "1")]
    for start, end, count in zip(found.edges, found.edges[1:], found.counts, strict=False):
        over = limit is not None and start > limit
        length = round(count / most * BAR * 8)
        bar = "█" * (length // 8) + " ▏▎▍▌▋▊▉"[length % 8].strip()
        bar = bar or ("▏" if count else "")
        label = f"{start:>{width},} to {end - 1:>{width},}"
        lines.append(f"{label}  {paint(bar, '31' if over else '34')} {count:,} ({count / total:.1%}){' over' * over}")
    return lines
