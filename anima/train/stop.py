"""Requests to stop: SIGTERM, SIGUSR1, Ctrl-C, a time limit. They only set flags; the loop asks at a step's end.

Knows nothing of checkpoints or ranks. A second Ctrl-C ends the process at once.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

from anima.errors import RunStopped

REASONS = ("SIGTERM", "SIGUSR1", "Ctrl-C", "--max_hours")
"""What can ask for a stop, in the order of `StopRequest.flags`."""
_SIGNALS = {signal.SIGTERM: 0, signal.SIGUSR1: 1, signal.SIGINT: 2}
_ECHO_SECONDS = 1.0
"""Launchers pass Ctrl-C on to ranks that the terminal has signalled already: such an echo is not a second Ctrl-C."""
INTERRUPTED_EXIT = 130


class StopRequest:
    """Flags of this process.

    Python's handlers run only between two instructions of the main thread, which may wait in a collective for
    minutes. So a thread reads the signal numbers that Python's C handler writes into a socket.

    Args:
        max_seconds: Time limit of the process; None for none.
        clock: Seconds, monotonic.
    """

    def __init__(self, max_seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock; signals are not caught yet."""
        self._flags = [0.0] * len(REASONS)
        self._clock = clock
        self._started = clock()
        self._max_seconds = max_seconds
        self._last_interrupt: float | None = None
        self._deferring = False
        self.reserve_seconds = 0.0
        """Time to keep free before the limit: a step and a save."""

    @classmethod
    def catching(cls, max_hours: float | None) -> "StopRequest":
        """With the clock and the signals of this process; see `catch_signals`."""
        stop = cls(None if max_hours is None else max_hours * 3600)
        stop.catch_signals()
        return stop

    def catch_signals(self) -> None:
        """From now on the three signals set flags. Call it in the main thread, once."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _nothing)
        threading.Thread(target=self._listen, args=(ours, theirs), name="signals", daemon=True).start()

    def defer(self) -> None:
        """From now on a request waits for the end of a step: before, there is nothing to save, and it ends at once."""
        self._deferring = True

    def flags(self) -> list[float]:
        """One number a reason: 1 if it has asked for a stop."""
        spent = self._clock() - self._started
        if self._max_seconds is not None and spent + self.reserve_seconds >= self._max_seconds:
            self._flags[3] = 1.0
        return list(self._flags)

    def received(self, number: int) -> None:
        """Take note of a signal; a second Ctrl-C does not return."""
        if number not in _SIGNALS:
            return
        now = self._clock()
        if not self._deferring:
            print(
                f"stopped: {REASONS[_SIGNALS[signal.Signals(number)]]} before the first step",
                file=sys.stderr,
                flush=True,
            )
            os._exit(INTERRUPTED_EXIT if number == signal.SIGINT else RunStopped.exit_code)
        if number == signal.SIGINT:
            if self._last_interrupt is not None and now - self._last_interrupt > _ECHO_SECONDS:
                os._exit(INTERRUPTED_EXIT)
            self._last_interrupt = now
        self._flags[_SIGNALS[signal.Signals(number)]] = 1.0

    def _listen(self, ours: socket.socket, theirs: socket.socket) -> None:
        while theirs.fileno() >= 0:
            for number in ours.recv(64):
                self.received(number)


def reasons(flags: Sequence[float]) -> list[str]:
    """What asked, from the flags of all ranks added up."""
    return [reason for reason, count in zip(REASONS, flags, strict=True) if count]


def _nothing(number: int, frame: object) -> None:
    """Keeps the signal's default action away; the thread does the work."""
