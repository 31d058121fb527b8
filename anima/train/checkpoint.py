"""Folders that exist only when they are whole: written aside, synced, listed in a manifest, renamed, named `latest`.

    checkpoints/step-200/   adapter_model.safetensors, adapter_config.json (plain PEFT), trainer_state.json,
                            manifest.json: every other file with its size and sha256
    checkpoints/latest      "step-200"; a hint, never trusted

What goes into a checkpoint is the caller's business.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"
LATEST = "latest"
PREFIX = "step-"


def commit(root: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Write checkpoint `step` under `root`; on return it is on disk, or nothing has changed.

    Args:
        root: The run's checkpoints/ folder.
        step: Optimizer step.
        write: Writes the files into the folder it is given.
        keep: Whole checkpoints to keep, the newest; older ones go after the new one is safe.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = root / f"{PREFIX}{step}"
    write_folder(final, write)
    replace_text(root / LATEST, final.name)
    prune(root, keep)
    return final


def write_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `final`, list and sync it, and give it its name; an older one is replaced.

    Raises:
        OSError: nothing was changed.
    """
    staging = final.with_name(f".staging-{final.name}-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        write(staging)
        write_manifest(staging)
        if final.exists():
            shutil.rmtree(final)
        os.rename(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync_folder(final.parent)


def write_manifest(folder: Path) -> None:
    """Sync every file of `folder` to disk and list it with size and sha256 in manifest.json."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync_file(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    replace_text(folder / MANIFEST, json.dumps({"files": files}, indent=1))
    _sync_folder(folder)


def problems(folder: Path) -> list[str]:
    """Why `folder` is not a whole checkpoint; empty if it is one."""
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = []
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256_of(path) != entry["sha256"]:
            found.append(f"{name} has changed since it was written")
    return found


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, whole or not, oldest first."""
    if not root.is_dir():
        return []
    names = [path.name.removeprefix(PREFIX) for path in root.iterdir() if path.name.startswith(PREFIX)]
    return sorted(int(name) for name in names if name.isdigit())


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed runs left half-written."""
    for step in steps(root)[:-keep]:
        shutil.rmtree(root / f"{PREFIX}{step}")
    for leftover in root.glob(".staging-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old content or the new, also after a power cut."""
    aside = path.with_name(f".{path.name}-{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
