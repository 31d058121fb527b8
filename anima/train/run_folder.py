"""The folder of a run: which files it holds, and that two runs never share one."""

import errno
import fcntl
import os
from typing import IO

from anima.config.paths import expanded
from anima.errors import CheckpointError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"


NOT_FINITE = "not_finite"
LOCK = ".lock"


def check_run_folder(output_dir: str, resume: str = "never") -> None:
    """Refuse a folder that holds another run, or cannot be written; on every rank, before any rank writes.

    Args:
        output_dir: The run's folder.
        resume: never, auto (then the folder's own run goes on), or a checkpoint (the same if it lies in the folder).

    Raises:
        CheckpointError: see above.
    """
    folder = expanded(output_dir, "--output_dir")
    traces = [name for name in (SUMMARY, ADAPTER, CHECKPOINTS) if (folder / name).exists()]
    metrics = folder / METRICS
    if metrics.is_file() and metrics.stat().st_size:  # a run that failed before its first line left nothing of value
        traces.append(METRICS)
    if resume == "auto":
        goes_on = (folder / CHECKPOINTS).exists() or not (folder / SUMMARY).exists()
    else:
        goes_on = expanded(resume, "--resume").resolve().parent == (folder / CHECKPOINTS).resolve()
    if traces and not goes_on:
        finished = ": a finished run that left no checkpoints" if resume == "auto" else ""
        raise CheckpointError(
            f"the output folder holds another run{finished}",
            where=f"--output_dir {output_dir}",
            got=", ".join(traces),
            allowed="a new or empty folder",
            fix=f"--output_dir {output_dir.rstrip('/')}-2, or move the old run away"
            + ("" if resume == "auto" else "; to go on with it: --resume auto"),
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(
            "the output folder cannot be written",
            where=f"--output_dir {output_dir}",
            got=f"{existing} is {'not writable' if existing.is_dir() else 'a file'}",
            fix="choose a folder of yours, on a cluster usually on the scratch file system",
        )


def claim(output_dir: str) -> IO[str] | None:
    """Keep other processes out of the folder for as long as the returned file is open; on rank 0.

    The system opens the lock when a process dies, however it dies. None where the file system knows no locks.

    Raises:
        CheckpointError: another process, alive, holds the folder.
    """
    folder = expanded(output_dir, "--output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise CheckpointError(
            "another process is training into this folder",
            where=f"--output_dir {output_dir}",
            fix="wait for it, stop it, or choose another folder",
        ) from None
    return file
