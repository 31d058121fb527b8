"""How many tokens a micro-batch should hold and how many layers should be recomputed: arithmetic on measured passes.

The arithmetic of a pass, fitted for each number of recomputed layers that was measured, is that of passes.py. Knows
neither where the figures come from nor what a layer is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anima.train.passes import FORWARD, Line, Point, memory_line, pace_like

STEP_TOKENS = 512
"""Micro-batches are chosen in steps of so many tokens."""
NEAR = 0.99
"""Share of the best speed that is as good; then less memory is better."""
STRETCH = 8
"""The largest pass that is measured, in smallest ones."""
SAFE = 0.7
"""Share of the memory that the largest measured pass may be expected to take."""


def next_size(points: Sequence[Point], *, small: int, most: int, room: float) -> int | None:
    """Tokens of the pass to measure next; None if there is no more to learn or no memory to learn it in.

    Two small passes, then one as large as is surely possible: it shows what passes of the training take. Then half of
    that: short passes wait for the host, and a line from them to a long one would promise too much beyond. Where there
    is no memory for the second, a smaller one.

    Args:
        points: Passes so far.
        small: Tokens of the first.
        most: Tokens of the largest that is of use.
        room: Bytes that there are.
    """
    if not points:
        return min(small, most)
    line, last = memory_line(points), points[-1].tokens
    if len(points) == 1:
        size = min(2 * small, most)
        if size <= last:
            return None
        return size if line.at(size) <= room else small // 2
    if len(points) == 3 and last > points[1].tokens:
        size = last // 2 // STEP_TOKENS * STEP_TOKENS
        return size if size > points[1].tokens else None
    if len(points) > 2 or last < points[0].tokens:
        return None
    size = min(STRETCH * small, most)
    if line.slope > 0:
        size = min(size, int(max(0.0, (SAFE * room - line.at_zero) / line.slope)))
    size = size // STEP_TOKENS * STEP_TOKENS
    return size if size > last else None


class Costs:
    """What a micro-batch takes, for every number of recomputed layers between those that were measured.

    Args:
        measured: Recomputed layers -> passes of one size or more. Its largest key is "all of them".
        away: A number of layers, and passes where these sent what they keep to host memory and none was recomputed;
            each is taken to free the same bytes and to take the same time. None where it was not measured.
        host_speed: Bytes a second to host memory, and back. Copies run beside the computation, so short passes, which
            wait for the host anyway, do not show what long ones wait for.
    """

    def __init__(
        self,
        measured: Mapping[int, Sequence[Point]],
        away: tuple[int, Sequence[Point]] | None = None,
        host_speed: float = math.inf,
    ) -> None:
        self._host_speed = host_speed
        self._known = sorted(measured)
        self.all_layers = self._known[-1]
        least = measured[self.all_layers]
        memory = memory_line(least).at_zero
        self._memory = {layers: memory_line(points, memory) for layers, points in measured.items()}
        self.fewest_layers = self._known[0]
        """Fewer could not be measured, so nothing is said about them."""
        # Each recomputed layer takes the same time, so the ends suffice: in between there would be noise.
        ends = (self.fewest_layers, self.all_layers)
        self._pace = {layers: pace_like(least, measured[layers]) for layers in ends}
        self.most_away, self._freed, self._slower = 0, Line(0.0, 0.0), Line(0.0, 0.0)
        if away is not None and self.fewest_layers == 0:
            self.most_away, passes = away
            self._freed = self._memory[0].less(memory_line(passes, memory), self.most_away)
            self._slower = pace_like(least, passes).device.less(self._pace[0].device, self.most_away)

    def bytes(self, tokens: int, layers: int, away: int = 0) -> float:
        """Peak of a micro-batch of so many tokens with the first `layers` recomputed and `away` of the others in host
        memory: never less than with all of them recomputed.
        """
        least = self._memory[self.all_layers].at(tokens)
        return max(least, self._all_kept_here(tokens, layers) - self.host_bytes(tokens, away))

    def host_bytes(self, tokens: int, away: int) -> float:
        """Host memory that what `away` layers keep takes."""
        return away * max(0.0, self._freed.at(tokens))

    def _all_kept_here(self, tokens: int, layers: int) -> float:
        """Bytes without host memory.

        Each layer more that is recomputed frees the same bytes, until the one layer that is being recomputed needs
        more than the kept ones: never less than with all of them. Between the last two measured numbers, where the
        bend lies, a straight line is taken if there are no two to go on from: it lies above.
        """
        low, high = self._around(layers)
        before = [known for known in self._known if known < low]
        if low < layers and before:
            first, second = ((n, self._memory[n].at(tokens)) for n in (before[-1], low))
            return max(_straight(first, second, layers), self._memory[self.all_layers].at(tokens))
        return self._between(self._memory, tokens, layers, low, high)

    def seconds(self, passes: int, tokens: int, layers: int, away: int = 0) -> float:
        """Time of `passes` micro-batches that hold `tokens` together."""
        computing = self._computing(passes, tokens, layers)
        if not away:
            return computing
        waited = away * max(0.0, self._slower.at_zero * passes + self._slower.slope * tokens)
        copying = away * max(0.0, self._freed.at_zero * passes + self._freed.slope * tokens) / self._host_speed
        # Recomputed layers come first and send nothing, so copies run beside the others alone: out, then back.
        beside = self._computing(passes, tokens, self.fewest_layers) * (1 - layers / self.all_layers)
        over = sum(max(0.0, copying - half * beside) for half in (FORWARD, 1 - FORWARD))
        return computing + max(waited, over)

    def _computing(self, passes: int, tokens: int, layers: int) -> float:
        few, every = self._pace[self.fewest_layers], self._pace[self.all_layers]
        between = self.all_layers - self.fewest_layers
        share = (layers - self.fewest_layers) / between if between else 0.0
        return few.towards(every, share).seconds(passes, tokens)

    def _around(self, layers: int) -> tuple[int, int]:
        if not self.fewest_layers <= layers <= self.all_layers:
            raise ValueError(f"{layers} layers were not measured, {self.fewest_layers} to {self.all_layers} were")
        return max(n for n in self._known if n <= layers), min(n for n in self._known if n >= layers)

    def _between(self, lines: Mapping[int, Line], tokens: int, layers: int, low: int, high: int) -> float:
        if low == high:
            return lines[low].at(tokens)
        return _straight((low, lines[low].at(tokens)), (high, lines[high].at(tokens)), layers)


def _straight(first: tuple[int, float], second: tuple[int, float], x: int) -> float:
    (x0, y0), (x1, y1) = first, second
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Load:
    """What some steps ask of the rank with the most to do, for one size of micro-batch.

    Attributes:
        passes: Micro-batches of these steps.
        tokens: That they hold together.
        heaviest: Tokens of the largest micro-batch that the run may have.
    """

    passes: int
    tokens: int
    heaviest: int


@dataclass(frozen=True)
class Choice:
    """A size of micro-batch, the layers to recompute, those to send to host memory, with the bytes and tokens/s (of all
    ranks) expected.
    """

    tokens: int
    layers: int
    bytes: float
    speed: float
    away: int = 0


def choices(costs: Costs, loads: Mapping[int, Load], total_tokens: int, host_room: float = math.inf) -> list[Choice]:
    """Everything there is to choose from.

    Args:
        costs: Of a micro-batch.
        loads: Tokens of a micro-batch, at most -> what the sampled steps then ask for.
        total_tokens: Of these steps, over all ranks.
        host_room: Bytes of host memory that a rank may take.
    """
    found = []
    for tokens, load in loads.items():
        for layers in range(costs.fewest_layers, costs.all_layers + 1):
            for away in range(0, min(costs.most_away, costs.all_layers - layers) + 1, max(1, costs.most_away // 10)):
                if costs.host_bytes(load.heaviest, away) > host_room:
                    break
                seconds = costs.seconds(load.passes, load.tokens, layers, away)
                taken = costs.bytes(load.heaviest, layers, away)
                found.append(Choice(tokens, layers, taken, total_tokens / seconds, away))
    return found


def best(candidates: Sequence[Choice], limit: float) -> Choice:
    """The fastest that fits into `limit` bytes, or one nearly as fast in less memory; if none fits, the smallest."""
    fitting = [choice for choice in candidates if choice.bytes <= limit]
    if not fitting:
        return min(candidates, key=_smallest)
    fastest = max(choice.speed for choice in fitting)
    return min((choice for choice in fitting if choice.speed >= NEAR * fastest), key=_smallest)


def _smallest(choice: Choice) -> tuple[float, int, int, int]:
    return choice.bytes, choice.tokens, choice.layers, choice.away


def sizes(longest: int, most: int) -> range:
    """Sizes of micro-batch to choose from: whole steps of 512 tokens, from the longest example to the most there is."""
    first, last = (-(-tokens // STEP_TOKENS) * STEP_TOKENS for tokens in (longest, max(longest, most)))
    return range(first, last + 1, STEP_TOKENS)
