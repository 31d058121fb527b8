"""Folders that exist only when they are whole: written aside, synced, listed in a manifest, renamed, named `latest`.

    checkpoints/step-200/   whatever the caller writes, and manifest.json: every other file with its size and sha256,
                            the step, the score, and a digest of the manifest itself
    checkpoints/latest      "step-200"; a hint for people, never trusted

What goes into a checkpoint is the caller's business.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anima.disk import replace_file, sync
from anima.errors import CheckpointError
from anima.train import faults

if TYPE_CHECKING:  # torch takes seconds to import, and looking at checkpoints does not need it
    from torch import Tensor

MANIFEST = "manifest.json"
LATEST = "latest"
PREFIX = "step-"
_STAGING, _REPLACED, _ASIDE = ".staging-", ".replaced-", "aside-"


def commit(root: Path, step: int, write: Callable[[Path], None], *, keep: int, score: float | None = None) -> Path:
    """Write checkpoint `step` under `root`; on return it is on disk, or nothing has changed.

    Args:
        root: The run's checkpoints/ folder.
        step: Optimizer step.
        write: Writes the files into the folder it is given.
        keep: Whole checkpoints to keep, the newest, and the best beside them; others go after the new one is safe.
        score: What "best" means, lower is better: the held-out loss, if it was measured at this step.

    Raises:
        OSError: the disk is full or not writable; older checkpoints are untouched.
    """
    final = root / f"{PREFIX}{step}"
    write_folder(final, write, step=step, score=score)
    replace_file(root / LATEST, final.name.encode())
    faults.fire("save.latest", step)
    prune(root, keep)
    return final


def write_folder(
    final: Path, write: Callable[[Path], None], *, step: int | None = None, score: float | None = None
) -> None:
    """Let `write` fill a folder beside `final`, list and sync it, and give it its name; an older one is replaced.

    Raises:
        OSError: nothing was changed.
    """
    staging = final.with_name(f"{_STAGING}{final.name}-{os.getpid()}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    faults.fire("save.begin", step)
    try:
        write(staging)
        faults.fire("save.files", step)
        write_manifest(staging, step=step, score=score)
        faults.fire("save.manifest", step)
        if final.exists():
            replaced = final.with_name(f"{_REPLACED}{final.name}-{os.getpid()}")
            os.rename(final, replaced)
            os.rename(staging, final)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(staging, final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync(final.parent)
    faults.fire("save.rename", step)


def write_result(final: Path, write: Callable[[Path], None]) -> None:
    """`write_folder` for what must not be lost: where the disk refuses, it goes to the folder for temporary files.

    Raises:
        CheckpointError: it does not lie where it belongs; says where it is.
    """
    try:
        write_folder(final, write)
    except OSError as error:
        rescued = Path(tempfile.mkdtemp(prefix="anima-adapter-")) / final.name
        write_folder(rescued, write)
        raise CheckpointError(
            f"the {final.name} could not be written to its place",
            where=final,
            got=error,
            fix=f"it lies in {rescued}: free some space and move it; or, with checkpoints, --resume auto",
        ) from None


def write_manifest(folder: Path, *, step: int | None = None, score: float | None = None) -> None:
    """Sync every file of `folder` to disk and list it with size and sha256 in manifest.json."""
    files = {}
    for path in _content(folder):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    listed: dict[str, Any] = {"step": step, "score": score, "files": files}
    replace_file(folder / MANIFEST, json.dumps(listed | {"digest": _digest(listed)}, indent=1).encode())
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged: its own digest does not fit.
    """
    listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(listed, dict) or listed.pop("digest", None) != _digest(listed):
        raise ValueError("its own digest does not fit")
    return listed


def problems(folder: Path) -> list[str]:
    """Why `folder` is not a whole checkpoint; empty if it is one. Reads every byte."""
    try:
        files: Mapping[str, Any] = read_manifest(folder)["files"]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError) as error:
        return [f"{MANIFEST} is damaged: {error}"]
    found = [
        f"{path.relative_to(folder).as_posix()} does not belong to it"
        for path in _content(folder)
        if path.relative_to(folder).as_posix() not in files
    ]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif sha256_of(path) != entry["sha256"]:
            found.append(f"{name} has changed since it was written")
    return found


@dataclass(frozen=True)
class Found:
    """A checkpoint as it lies there.

    Attributes:
        folder: Where.
        problems: Why it is not whole; empty if it is.
    """

    folder: Path
    problems: tuple[str, ...]


def newest_whole(root: Path) -> tuple[Path | None, list[Found]]:
    """The newest whole checkpoint under `root`, and the newer ones that had to be passed over."""
    passed_over: list[Found] = []
    for step in reversed(steps(root)):
        folder = root / f"{PREFIX}{step}"
        if not (why := problems(folder)):
            return folder, passed_over
        passed_over.append(Found(folder, tuple(why)))
    return None, passed_over


def steps(root: Path) -> list[int]:
    """Steps of the checkpoints under `root`, whole or not, oldest first."""
    if not root.is_dir():
        return []
    names = [path.name.removeprefix(PREFIX) for path in root.iterdir() if path.name.startswith(PREFIX)]
    return sorted(int(name) for name in names if name.isdecimal())


def set_aside(root: Path, after: int) -> list[Path]:
    """Rename the checkpoints later than step `after`, from which a run has turned back, so that none is taken again."""
    moved = []
    for step in steps(root):
        if step > after:
            aside = root / f"{_ASIDE}{PREFIX}{step}"
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(root / f"{PREFIX}{step}", aside)
            moved.append(aside)
    return moved


def remove_aside(root: Path) -> list[Path]:
    """Delete what `set_aside` renamed; the folders deleted."""
    found = sorted(root.glob(f"{_ASIDE}{PREFIX}*"))
    for folder in found:
        shutil.rmtree(folder)
    return found


def best_step(root: Path) -> int | None:
    """Step of the checkpoint with the lowest score; None if none has one."""
    return _best(_scores(root))


def _best(scores: Mapping[int, float | None]) -> int | None:
    known = {step: score for step, score in scores.items() if score is not None}
    return min(known, key=lambda step: (known[step], -step), default=None)


def _scores(root: Path) -> dict[int, float | None]:
    """Score of every checkpoint whose manifest can be read."""
    scores = {}
    for step in steps(root):
        try:
            scores[step] = read_manifest(root / f"{PREFIX}{step}")["score"]
        except (OSError, ValueError):
            continue
    return scores


def prune(root: Path, keep: int) -> list[int]:
    """Delete all but the newest `keep` checkpoints and the best, and what killed runs left; the steps deleted.

    Folders whose manifest cannot be read neither count nor go: a damaged one must not push a whole one out.
    """
    scores = _scores(root)
    best = _best(scores)
    gone = [step for step in sorted(scores)[:-keep] if step != best]
    for step in gone:
        shutil.rmtree(root / f"{PREFIX}{step}")
    for leftover in [*root.glob(f"{_STAGING}*"), *root.glob(f"{_REPLACED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    return gone


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write host tensors as safetensors.

    Raises:
        OSError: the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file, in host memory."""
    from safetensors.torch import load_file

    return load_file(path)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _content(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / MANIFEST)


def _digest(listed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
