"""The folder of a run: which files it holds, and that two runs never share one."""

import os
from pathlib import Path

from anima.errors import CheckpointError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"


def check_run_folder(output_dir: str) -> None:
    """Refuse a folder that holds another run, or cannot be written; on every rank, before any rank writes.

    Raises:
        CheckpointError: see above.
    """
    folder = Path(output_dir).expanduser()
    traces = [name for name in (SUMMARY, ADAPTER, CHECKPOINTS) if (folder / name).exists()]
    metrics = folder / METRICS
    if metrics.is_file() and metrics.stat().st_size:  # a run that failed before its first line left nothing of value
        traces.append(METRICS)
    if traces:
        raise CheckpointError(
            "the output folder holds another run",
            where=f"--output_dir {output_dir}",
            got=", ".join(traces),
            allowed="a new or empty folder",
            fix=f"--output_dir {output_dir.rstrip('/')}-2, or move the old run away",
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise CheckpointError(
            "the output folder cannot be written",
            where=f"--output_dir {output_dir}",
            got=f"{existing} is {'not writable' if existing.is_dir() else 'a file'}",
            fix="choose a folder of yours, on a cluster usually on the scratch file system",
        )
