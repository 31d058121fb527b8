"""The base on a disk of the node itself: copied once, under a lock, compared with the original, used again.

A copy is named by where its original lies and by the sizes and times of its files, so that a changed base is another
one. Knows nothing of models but which files of a folder one needs.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from anima.config.flags import filled_in
from anima.config.paths import expanded
from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.train import checkpoint

OTHER_WEIGHTS = {".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth"}
"""Weights in formats that are never loaded here."""
FRESH_SECONDS = 600.0
"""A copy whose every byte was read so lately is not read again: by the other ranks of the node, above all."""
_PIECE = 1 << 24
_RESERVE = 1 << 28
"""Bytes that stay free beside the copy."""


def local_base(config: ModelConfig, tell: Callable[[str], None]) -> Path | None:
    """The folder to load the base from: a copy under `base_staging_dir`; None if none is asked for or needed.

    Every rank of a node may call this at the same time: one copies, the others wait.

    Args:
        config: Which base, and where its copy belongs.
        tell: Hears what was done, on the rank that did it.

    Raises:
        ConfigError: base_staging_dir names a variable that is not set on this node.
        ModelError: the base is not there, or the staging folder cannot be written or is too small.
    """
    if config.base_staging_dir is None or config.random_weights:
        return None
    source = _source(config.model_name_or_path)
    files = base_files(source)
    where = f"--base_staging_dir {config.base_staging_dir}"
    root = Path(filled_in(config.base_staging_dir, where, os.environ))
    target = root / f"{source.name}-{_key(source, files)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{target.name}.lock"):
            _bring(source, files, target, where, tell)
    except OSError as error:
        raise ModelError(
            "the base cannot be copied to this node",
            where=where,
            got=error,
            allowed="a folder of yours on a disk of the node, such as $TMPDIR or /scratch/$USER",
            fix="name another folder, or leave the option out: the base is then read from where it lies",
        ) from None
    return target


def base_files(source: Path) -> list[Path]:
    """What of a model's folder is copied: its files, without weights in formats that are not read, sorted.

    A list of its files that lies there too stays behind: the copy gets one of its own.
    """
    files = (path for path in source.iterdir() if path.is_file() and path.name != checkpoint.MANIFEST)
    return sorted(path for path in files if path.suffix not in OTHER_WEIGHTS)


def _source(name_or_path: str) -> Path:
    folder = expanded(name_or_path)
    if folder.is_dir():
        return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name_or_path, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            "the base is not there to be copied",
            where=f"--model_name_or_path {name_or_path}",
            got=str(error).strip().splitlines()[0],
            allowed="a folder, or a hub name that is in the hub's cache",
            fix="fetch it where there is a network: hf download " + name_or_path,
        ) from None


def _key(source: Path, files: Sequence[Path]) -> str:
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(source), stats)).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone on this node; the system opens the lock when its holder dies."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _bring(source: Path, files: Sequence[Path], target: Path, where: str, tell: Callable[[str], None]) -> None:
    """Make sure that `target` is a whole copy; under the lock."""
    stamp = target.with_name(f"{target.name}.verified")
    began = time.perf_counter()
    if target.is_dir():
        if _is_fresh(stamp) and _sizes(files) <= _sizes(target.iterdir()):
            return
        problems = checkpoint.problems(target)
        if not problems:
            stamp.touch()
            tell(f"base: the copy in {target} is whole ({time.perf_counter() - began:.1f} s to verify)")
            return
        tell(f"base: the copy in {target} is made anew: {'; '.join(problems)}")
        shutil.rmtree(target)
    for leftover in target.parent.glob(f".*-{target.name}-*"):  # of a copy that was killed; the lock says so
        shutil.rmtree(leftover)
    size = sum(path.stat().st_size for path in files)
    _check_room(target.parent, size, where)
    checkpoint.write_folder(target, lambda folder: _copy(files, folder))
    stamp.touch()
    seconds = time.perf_counter() - began
    tell(f"base: copied {source} to {target}, {size / 2**30:.2f} GiB in {seconds:.1f} s, and compared")


def _is_fresh(stamp: Path) -> bool:
    return stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < FRESH_SECONDS


def _sizes(files: Iterable[Path]) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_size) for path in files}


def _check_room(root: Path, size: int, where: str) -> None:
    free = shutil.disk_usage(root).free
    if free < size + _RESERVE:
        copies = (stamp.with_suffix("") for stamp in root.glob("*.verified"))  # nothing else there is ours to delete
        others = sorted(str(copy) for copy in copies if copy.is_dir())
        raise ModelError(
            "there is no room for a copy of the base on this node",
            where=where,
            got=f"{free / 2**30:.2f} GiB free in {root}",
            allowed=f"{(size + _RESERVE) / 2**30:.2f} GiB",
            fix=f"rm -r {' '.join(others)}" if others else "name a folder on a larger disk, or leave the option out",
        )


def _copy(files: Sequence[Path], folder: Path) -> None:
    """Copy, and read every byte back from the disk to compare it with what was read from the original."""
    for path in files:
        copied = folder / path.name
        digest = hashlib.sha256()
        with path.open("rb") as original, copied.open("wb") as copy:
            while piece := original.read(_PIECE):
                digest.update(piece)
                copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
            os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that the disk answers, not memory
        if checkpoint.sha256_of(copied) != digest.hexdigest():
            raise OSError(f"{copied}: what was read back is not what was written")
