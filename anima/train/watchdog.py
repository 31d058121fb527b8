"""Ends a process that no longer gets anywhere, with the Python stack of every thread.

Knows nothing of what the process does: who works says `beat`.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

HANG_EXIT = 8
_LAST_RESORT_SECONDS = 60.0
_OTHERS_SECONDS = 3.0
"""Ranks notice within seconds of each other. One that ended at once would break the collective in which the others wait
before these have said where."""


class Watchdog:
    """A thread that waits for beats.

    Args:
        seconds: Longest time between two beats.
        folder: Where the stacks go, as `stacks-rank-N.txt`, besides stderr.
        rank: Whose they are.
        end: How to end the process; for tests.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, end: Callable[[int], None] = os._exit) -> None:
        """Nothing is watched before `start`."""
        self._seconds = seconds
        self._path = folder / f"stacks-rank-{rank}.txt"
        self._rank = rank
        self._end = end
        self._last = time.monotonic()
        self._doing = "starting"
        self._done = threading.Event()

    def start(self) -> None:
        """Watch until `stop`."""
        self.beat("starting")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Something was achieved; `doing` is what comes next, for the report."""
        self._last, self._doing = time.monotonic(), doing
        # A thread of C, for code that hangs without ever letting another Python thread run.
        faulthandler.dump_traceback_later(self._seconds + _LAST_RESORT_SECONDS, exit=True, file=sys.stderr)

    def stop(self) -> None:
        """No longer watch."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._report()
                time.sleep(_OTHERS_SECONDS)
                self._end(HANG_EXIT)
                return

    def _report(self) -> None:
        text = (
            f"rank {self._rank}: nothing has moved for {self._seconds:.0f} s (--hang_timeout_minutes), at {self._doing}"
        )
        print(f"error: {text}; stacks in {self._path}", file=sys.stderr, flush=True)
        try:
            with self._path.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            print(f"error: {self._path}: {error.strerror}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)
