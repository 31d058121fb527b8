"""How far a run is: one line rewritten in place on a terminal, now and then a plain line in a log.

Knows steps and a few numbers, not what is trained. A log never gets control characters. A stream that cannot be
written (full disk, closed pipe) is given up in silence: it must not stop the training it reports.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from anima.tracking.terminal import cut, printable, text_width

_BAR_COLUMNS = 20
_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 10.0
_RATE_STEPS = 50
"""Steps whose mean duration gives the ETA."""

_ERASE_LINE = "\r\x1b[2K"


class Progress:
    """The progress of one process's run; silent on ranks that are not the main one.

    Args:
        total_steps: Last step of the run.
        start_step: Steps done before this process began (resumed runs).
        is_main: Whether to print at all.
        stream: Where to; None is stderr.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        is_main: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock; prints nothing yet."""
        self._total_steps = total_steps
        self._stream: TextIO | None = (sys.stderr if stream is None else stream) if is_main else None
        self._on_terminal = self._stream is not None and self._stream.isatty()
        self._clock = clock
        self._step = start_step
        self._numbers: dict[str, float] = {}
        self._times: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=_RATE_STEPS + 1)
        self._last_shown = -math.inf
        self._last_line = ""

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        memory_gib: float | None = None,
    ) -> None:
        """`step` is done. A number that is None keeps its last value. Prints only if the last line is old enough."""
        now = self._clock()
        self._step = step
        self._times.append((step, now))
        given = {"loss": loss, "tokens_per_second": tokens_per_second, "memory_gib": memory_gib}
        self._numbers |= {name: value for name, value in given.items() if value is not None}
        interval = _TERMINAL_SECONDS if self._on_terminal else _LOG_SECONDS
        if step >= self._total_steps or now - self._last_shown >= interval:
            self._last_shown = now
            self._show()

    def begin(self) -> None:
        """The next step begins now: what came before, such as a first evaluation, says nothing about the ETA."""
        self._times.clear()
        self._times.append((self._step, self._clock()))

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar on a terminal."""
        text = printable(text)
        if self._on_terminal:
            self._write(f"{_ERASE_LINE}{text}\n{self._last_line}")
        else:
            self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the bar as it is and go to the next line; a second call does nothing."""
        if self._on_terminal and self._last_line:
            self._write("\n")
        self._stream = None

    def line(self) -> str:
        """The current state in one line, without a line end."""
        steps = f"{self._step:>{len(str(self._total_steps))}}/{self._total_steps}"
        parts = [f"{self._bar()}step {steps} {self._share():4.0%}"]
        if "loss" in self._numbers:
            parts.append(f"loss {self._numbers['loss']:.4f}")
        if "tokens_per_second" in self._numbers:
            parts.append(f"{self._numbers['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"ETA {self._eta()}")
        if "memory_gib" in self._numbers:
            parts.append(f"{self._numbers['memory_gib']:.1f} GiB")
        return "  ".join(parts)

    def _share(self) -> float:
        return min(1.0, self._step / self._total_steps) if self._total_steps else 1.0

    def _bar(self) -> str:
        filled = int(self._share() * _BAR_COLUMNS)
        return f"[{'#' * filled}{'.' * (_BAR_COLUMNS - filled)}] "

    def _eta(self) -> str:
        (first_step, first_time), (last_step, last_time) = self._times[0], self._times[-1]
        if last_step <= first_step:
            return "?"
        remaining = max(0, self._total_steps - last_step)
        return format_duration(remaining * (last_time - first_time) / (last_step - first_step))

    def _show(self) -> None:
        line = self.line()
        if not self._on_terminal:
            self._write(f"{line}\n")
            return
        # One column stays free: some terminals wrap as soon as the last one is filled.
        room = self._columns() - 1
        line = cut(line if text_width(line) <= room else line.removeprefix(self._bar()), room)
        # Overwrite instead of erasing first: no flicker.
        blank = " " * max(0, text_width(self._last_line) - text_width(line))
        self._last_line = line
        self._write(f"\r{line}{blank}\r{line}" if blank else f"\r{line}")

    def _columns(self) -> int:
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns if self._stream else 0
        except OSError:
            columns = 0
        return columns or 80

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self._stream = None


def format_duration(seconds: float) -> str:
    """`seconds` as 0:42, 12:03 or 3:04:05, with days from 24 hours on: 2d 03:04."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
