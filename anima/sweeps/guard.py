"""A trial does not outlive its sweep: another process waits at a pipe that the kernel closes when the sweep dies.

SIGKILL leaves a sweep no last word, and a signal at the parent's death (PR_SET_PDEATHSIG) would reach the launcher
alone, which leaves its ranks behind. As a program this needs only the standard library: one starts with each trial.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

OVER = b"over"
"""What a sweep writes into the pipe when there is nothing to end any more; its number may be another process's soon."""


@contextmanager
def dying_with_us(trial: "subprocess.Popen[bytes]", log: IO[bytes]) -> Iterator[None]:
    """Within, the death of this process kills a trial and all below it; so does an error that leaves it running.

    Args:
        trial: Leader of a process group of its own.
        log: Hears why it has ended.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(trial.pid)],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,  # Ctrl-C in the terminal is not for it
    )
    try:
        yield
    finally:
        pipe: IO[bytes] = guard.stdin  # type: ignore[assignment]
        with suppress(BrokenPipeError):  # somebody has ended the guard
            if trial.poll() is not None:
                pipe.write(OVER)
            pipe.close()
        guard.wait()


def children(pid: int) -> list[int]:
    """Processes that a process has started, as far as they live."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has just ended
            found += map(int, path.read_text().split())
    return found


def end(pid: int) -> None:
    """SIGKILL to a process and all below it, whatever their groups; each is halted first, so that it starts no more."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        for child in children(pid):
            end(child)
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Wait until the sweep has died, or says that the trial is over."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # what asks a whole job to stop: the trial may save before it ends
    trial = int(sys.argv[1])
    if sys.stdin.buffer.read() != OVER:
        print("the sweep has died, so its trial is killed; the sweep's command goes on with it", flush=True)
        end(trial)
        with suppress(ProcessLookupError):
            os.killpg(trial, signal.SIGKILL)  # what a launcher that was gone already had left behind


if __name__ == "__main__":
    main()
