"""Faults on purpose, for tests: ANIMA_FAULT="kind@phase:rank:step,…" makes a process fail at that place.

Unset, nothing happens. `*` stands for any rank or step. Phases: step, forward, backward, save.begin, save.files,
save.manifest, save.rename, save.latest. Kinds: kill, hang, slow, term, usr1, int, oom, enospc, nan.
"""

import errno
import os
import signal
import time
from functools import cache

VARIABLE = "ANIMA_FAULT"
SLOW_SECONDS = 0.5
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "int": signal.SIGINT}

_now = {"step": 0}


@cache
def _planned() -> tuple[tuple[str, str, str, str], ...]:
    """(kind, phase, rank, step) of every fault asked for; malformed text is a ValueError, since only tests write it."""
    found = []
    for text in filter(None, os.environ.get(VARIABLE, "").split(",")):
        kind, place = text.split("@")
        phase, rank, step = place.split(":")
        found.append((kind, phase, rank, step))
    return tuple(found)


def fire(phase: str, step: int | None = None) -> bool:
    """Fail here if that was asked for.

    Args:
        phase: Where we are.
        step: Optimizer step; None: the one that the phase `step` named last.

    Returns:
        True if the loss is to become NaN here: the one fault that the caller must commit itself.
    """
    if not _planned():
        return False
    if phase == "step" and step is not None:
        _now["step"] = step
    here = (phase, os.environ.get("RANK", "0"), str(_now["step"] if step is None else step))
    due = [
        kind
        for kind, *place in _planned()
        if all(asked in ("*", actual) for asked, actual in zip(place, here, strict=True))
    ]
    for kind in due:
        _commit(kind, phase)
    return "nan" in due


def _commit(kind: str, phase: str) -> None:
    if kind in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[kind])
    elif kind == "hang":
        while True:
            time.sleep(1)
    elif kind == "slow":
        time.sleep(SLOW_SECONDS)
    elif kind == "oom":
        import torch  # late: commands that only look at files come through here too

        raise torch.OutOfMemoryError(f"on purpose, at {phase}")
    elif kind == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
