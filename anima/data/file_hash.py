"""sha256 of files, remembered for large ones, so that a start does not read gigabytes to learn that nothing changed.

A remembered hash belongs to a path with its size, inode and both time stamps in nanoseconds. A file that was written
moments before it was hashed is not remembered: it could be written again within the same tick of the clock.
"""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

from anima.disk import replace_file

LARGE_BYTES = 16 << 20
"""Smaller files are hashed in milliseconds, and leave nothing behind."""

SETTLED_SECONDS = 2.0
"""Age of a file's last change from which its time stamps can be trusted."""


def file_hash(path: Path, cache_dir: Path | None = None) -> str:
    """sha256 of the file's bytes, in hexadecimal.

    Args:
        path: The file.
        cache_dir: Folder whose subfolder `hashes` remembers large files; None reads the file in any case.

    Raises:
        OSError: The file cannot be read.
    """
    before = _state(path)
    if cache_dir is None or before["size"] < LARGE_BYTES:
        return _digest(path)
    memory = cache_dir / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    known = _remembered(memory, before)
    if known is not None:
        return known
    digest = _digest(path)
    settled = time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED_SECONDS * 1e9
    if settled and _state(path) == before:
        with suppress(OSError):  # a memory that cannot be written only costs time
            _remember(memory, {**before, "sha256": digest})
    return digest


def _state(path: Path) -> dict[str, int]:
    found = path.stat()
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(memory: Path, state: dict[str, int]) -> str | None:
    try:
        entry = json.loads(memory.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or entry != {**state, "sha256": entry.get("sha256")}:
        return None
    return str(entry["sha256"])


def _remember(memory: Path, entry: dict[str, object]) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    replace_file(memory, json.dumps(entry).encode())
