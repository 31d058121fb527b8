"""Measured passes, and what passes of other sizes would take: lines through points.

A pass of T tokens takes a + b*T bytes and c + d*T seconds, or as long as the host needs for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
FLAT = 1.2
"""Passes of different sizes within this factor of the fastest took what the host needs to tell the device."""
DISTURBED = 1.5
"""Times as long a token as in the longest pass: other work came in between."""
FORWARD = 0.4
"""Share of a pass without recomputed layers that its forward half takes: over a frozen base the backward half has as
many large products, and LoRA's gradients besides."""


@dataclass(frozen=True)
class Point:
    """A measured forward and backward pass: its tokens, the bytes it took at its peak, its seconds."""

    tokens: int
    bytes: float
    seconds: float

    def __str__(self) -> str:
        """As it belongs into a message."""
        return f"{self.tokens:,} tokens {self.seconds:.2f} s {self.bytes / GIB:.1f} GiB"


@dataclass(frozen=True)
class Line:
    """at_zero + slope * x."""

    at_zero: float
    slope: float

    def at(self, x: float) -> float:
        """The value at `x`."""
        return self.at_zero + self.slope * x

    def less(self, other: "Line", parts: int) -> "Line":
        """One of `parts` equal parts of the difference."""
        return Line((self.at_zero - other.at_zero) / parts, (self.slope - other.slope) / parts)


def memory_line(points: Sequence[Point], at_zero: float = 0.0) -> Line:
    """Bytes by tokens: through the two largest passes, because small ones hide growth behind what all passes need.

    Where only one size was measured, `at_zero` is what does not grow.
    """
    return _line([(point.tokens, point.bytes) for point in points], at_zero)


@dataclass(frozen=True)
class Pace:
    """Seconds of passes: those of the device, by tokens, but never less than the host needs to tell it what to do."""

    device: Line
    host: float = 0.0

    def seconds(self, passes: int, tokens: int) -> float:
        """Of `passes` micro-batches that hold `tokens` together."""
        return max(self.host * passes, self.device.at_zero * passes + self.device.slope * tokens)

    def towards(self, other: "Pace", share: float) -> "Pace":
        """The pace at `share` of the way to another."""

        def between(here: float, there: float) -> float:
            return here + share * (there - here)

        at_zero = between(self.device.at_zero, other.device.at_zero)
        slope = between(self.device.slope, other.device.slope)
        return Pace(Line(at_zero, slope), between(self.host, other.host))


def pace_of(points: Sequence[Point], at_zero: float = 0.0) -> Pace:
    """The device's line goes through the two largest passes that neither waited for the host nor were disturbed;
    neither part is negative, which noise could make of short passes.
    """
    waited, longest = _waited_for_the_host(points), max(points, key=lambda point: point.tokens)
    slowest = DISTURBED * longest.seconds / longest.tokens
    own = [p for p in points if p not in waited and p.seconds <= slowest * p.tokens] or points
    line = _line([(point.tokens, point.seconds) for point in own], at_zero)
    tokens, seconds = max((point.tokens, point.seconds) for point in own)
    if line.at_zero < 0:
        line = Line(0.0, seconds / tokens)
    host = min((point.seconds for point in waited), default=0.0)
    return Pace(line if line.slope >= 0 else Line(seconds, 0.0), host)


def pace_like(long: Sequence[Point], points: Sequence[Point]) -> Pace:
    """The pace of `points`, which recompute nothing, where `long` recompute all.

    If those reach further, their line is taken, for a multiple: what was computed again was computed in the same way,
    and the slope of two short passes is noise. Passes that wait for the host do not tell which multiple.
    """
    pattern, last = pace_of(long), max(points, key=lambda point: point.tokens)
    if last.tokens >= max(point.tokens for point in long):
        return pace_of(points, pattern.device.at_zero)
    if last.tokens <= max((point.tokens for point in _waited_for_the_host(long)), default=0):
        factor, host = 1 / (1 + FORWARD), min(point.seconds for point in points)
    else:
        at_last = pattern.seconds(1, last.tokens)
        factor = last.seconds / next((p.seconds for p in long if p.tokens == last.tokens), at_last)
        host = min((point.seconds for point in _waited_for_the_host(points)), default=0.0)
    return Pace(Line(factor * pattern.device.at_zero, factor * pattern.device.slope), host)


def _waited_for_the_host(points: Sequence[Point]) -> list[Point]:
    """Passes up to the largest that took no longer than much smaller ones."""
    fastest = min(point.seconds for point in points)
    alike = [point for point in points if point.seconds <= FLAT * fastest]
    smallest, reach = min(point.tokens for point in alike), max(point.tokens for point in alike)
    return [point for point in points if point.tokens <= reach] if reach >= 1.5 * smallest else []


def _line(points: Sequence[tuple[int, float]], at_zero: float) -> Line:
    *_, (x, y) = ordered = sorted(points)
    others = [point for point in ordered if point[0] < x]
    if not others:
        constant = min(max(0.0, at_zero), y)
        return Line(constant, (y - constant) / x)
    slope = (y - others[-1][1]) / (x - others[-1][0])
    return Line(y - slope * x, slope)
