"""What a forward and backward pass takes on this device: memory and time, under several policies and sizes.

Every rank runs the same passes; what the worst of them needed counts, so that all come to the same figures.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from anima import distributed
from anima.objectives.objective import Objective
from anima.train.budget import next_size
from anima.train.discarded import discarded, release, run_pass
from anima.train.engine import Engine
from anima.train.passes import Point

SMALL_TOKENS = 1024
"""The smallest pass; smaller ones tell little, because all of a GPU is hardly busy."""
FEWEST_TOKENS = 256
"""Where a small pass does not fit, half of it is tried, down to this."""
COPIED_BYTES = 1 << 28
LONG_SECONDS = 60.0
"""A pass that takes longer is not repeated: what only the first one of its size costs is little of it. Pinning host
memory for 30 layers of 7,680 tokens took 12 s of 14."""


class Gauge(Protocol):
    """Reads memory and time of a device."""

    def allocated(self) -> int:
        """Bytes that tensors take now."""
        ...

    def room(self) -> int:
        """Bytes that more tensors could take."""
        ...

    def start(self) -> None:
        """From here on `stop` counts."""
        ...

    def stop(self) -> tuple[int, float]:
        """Most bytes that tensors took, and the seconds, since `start`."""
        ...

    def host_speed(self) -> float:
        """Bytes a second to host memory; every rank asks at once."""
        ...


class GpuGauge:
    """A CUDA device as torch's allocator sees it.

    Args:
        device: The GPU.
        cap: Bytes that this process may take; None for all.
    """

    def __init__(self, device: torch.device, cap: float | None) -> None:
        self._device, self._cap, self._started = device, cap, 0.0

    def allocated(self) -> int:
        """Without what the allocator holds unused."""
        return torch.cuda.memory_allocated(self._device)

    def room(self) -> int:
        """Free on the card or held unused by this process, and within its cap."""
        allocated = torch.cuda.memory_allocated(self._device)
        held = torch.cuda.memory_reserved(self._device) - allocated
        room = torch.cuda.mem_get_info(self._device)[0] + held
        return room if self._cap is None else min(room, int(self._cap) - allocated)

    def start(self) -> None:
        """Wait for the device, then begin."""
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()

    def stop(self) -> tuple[int, float]:
        """Wait for the device first."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device), time.perf_counter() - self._started

    def host_speed(self) -> float:
        """The best of three copies to pinned memory."""
        here = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=self._device)
        there = torch.empty(COPIED_BYTES, dtype=torch.uint8, pin_memory=True)
        taken = []
        for _ in range(3):
            self.start()
            there.copy_(here, non_blocking=True)
            taken.append(self.stop()[1])
        return COPIED_BYTES / min(taken)


@dataclass(frozen=True)
class Measured:
    """What the passes took.

    Attributes:
        points: Policy -> passes that ran; policies under which none ran are left out.
        before: Bytes that are taken without a pass, with the moments that the first step will create; the points count
            from here. Of the rank with the most.
        capacity: Bytes that a process may take in all beside paged moments, on the rank with the least.
        host_speed: Bytes a second to host memory, of the slowest rank.
    """

    points: dict[str, list[Point]]
    before: int
    capacity: int
    host_speed: float

    def __str__(self) -> str:
        """For a person who wants to know why the choice fell as it did: a new line for every policy."""
        lines = [f"{policy:9} {' · '.join(map(str, points))}" for policy, points in self.points.items()]
        return "".join(f"\n  {line}" for line in [*lines, f"to host memory {self.host_speed / 1e9:.0f} GB/s"])


def measure(
    engine: Engine,
    objective: Objective[Any],
    packed: Callable[[int], Any],
    apply: Callable[[str], None],
    policies: Sequence[str],
    *,
    longest: int,
    most: int,
    gauge: Gauge,
) -> Measured:
    """Run passes and read the gauge; leaves training as it was, but for the policy. A collective.

    Args:
        engine: In train mode.
        objective: The loss.
        packed: A micro-batch of real examples of at most so many tokens, the same on every rank.
        apply: Puts a policy of `--recompute` into force.
        policies: To measure; those that take the least memory first.
        longest: Tokens of the longest example.
        most: Tokens of the largest micro-batch that could be of use.
        gauge: Of the engine's device.
    """
    batch = functools.cache(packed)
    release(engine.device)
    before, moments = gauge.allocated(), engine.missing_moment_bytes(paged=False)
    pages = engine.missing_moment_bytes(paged=True)  # they find other room if they must, and every step is slower then
    room = min(distributed.gather_objects(gauge.room() - moments - pages))  # communication takes some later
    small = min(max(longest, SMALL_TOKENS), most)
    points: dict[str, list[Point]] = {}
    with discarded(engine):
        for policy in policies:
            apply(policy)
            if not points:  # compiles kernels, and leaves gradients behind, which passes of the training find as well
                run_pass(engine, objective, batch(min(small, FEWEST_TOKENS)))
            points[policy] = _climb(engine, objective, batch, small, most, room, before, gauge)
    batch.cache_clear()
    release(engine.device)
    mine = before + moments, gauge.allocated() + gauge.room() - pages, gauge.host_speed()
    taken, capacities, speeds = zip(*distributed.gather_objects(mine), strict=True)
    ran = {policy: measured for policy, measured in points.items() if measured}
    return Measured(ran, max(taken), min(capacities), min(speeds))


def _climb(
    engine: Engine,
    objective: Objective[Any],
    batch: Callable[[int], Any],
    small: int,
    most: int,
    room: int,
    before: int,
    gauge: Gauge,
) -> list[Point]:
    """Passes that grow, until there is no more to learn or a rank has no memory for more."""
    points: list[Point] = []
    while (size := next_size(points, small=small, most=most, room=room)) is not None:
        micro_batch = batch(size)
        tokens = sum(micro_batch.document_lengths)
        if tokens in [point.tokens for point in points]:  # there are no other examples
            break
        point = _point(engine, objective, micro_batch, tokens, before, gauge)
        if point is not None:
            points.append(point)
        elif points or small < 2 * FEWEST_TOKENS:
            break
        else:
            small //= 2
    return points


def _point(
    engine: Engine,
    objective: Objective[Any],
    batch: Any,  # noqa: ANN401  (the objective's)
    tokens: int,
    before: int,
    gauge: Gauge,
) -> Point | None:
    """A pass, three times, since the first compiles and gets its memory, and hosts have other work too; None if a rank
    has too little memory. A collective.
    """
    mine: tuple[int, float] | None = None
    for _ in range(3):
        gauge.start()
        if not run_pass(engine, objective, batch):
            release(engine.device)
            mine = None
            break
        taken, seconds = gauge.stop()
        mine = (taken - before, seconds) if mine is None else (max(mine[0], taken - before), min(mine[1], seconds))
        if seconds > LONG_SECONDS:
            break
    everywhere = distributed.gather_objects(mine)
    found = [one for one in everywhere if one is not None]
    if len(found) < len(everywhere):
        return None
    return Point(tokens, max(taken for taken, _ in found), max(seconds for _, seconds in found))
