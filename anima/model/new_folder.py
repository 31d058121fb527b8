"""A folder that appears all at once: written beside its place, flushed to the disk, moved there by one rename.

Owns the rule that a model folder which exists is whole. Does not know what is in it.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from anima.disk import sync
from anima.errors import ModelError

GIB = 2**30


@contextmanager
def new_folder(output_dir: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """A fresh folder beside `output_dir` to write into; it becomes `output_dir` when the block ends without an error.

    What an interrupted run left behind is removed first, so that starting again is all there is to do.

    Args:
        output_dir: Where the result shall be; new or empty.
        need_bytes: What will be written, about.

    Raises:
        ModelError: `output_dir` holds something or cannot be made, another process is writing it, or the disk is too
            small.
    """
    check_new(output_dir)
    lock = FileLock(output_dir.with_name(f".{output_dir.name}.lock"), timeout=0)
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ModelError(
            "another process is writing this folder", where=f"--output_dir {output_dir}", fix="wait for it"
        ) from None
    except OSError as error:
        raise ModelError(
            "the output folder cannot be made",
            where=f"--output_dir {output_dir}",
            got=error.strerror,
            fix="choose a folder of yours",
        ) from None
    try:
        with written_aside(output_dir, need_bytes=need_bytes) as partial_dir:
            yield partial_dir
    finally:
        lock.release()


@contextmanager
def written_aside(output_dir: Path, *, need_bytes: int = 0) -> Iterator[Path]:
    """`new_folder` for a caller that holds a lock of its own.

    Raises:
        ModelError: `output_dir` holds something, or the disk is too small.
    """
    check_new(output_dir)  # also after waiting for a lock: a parallel process may have made it meanwhile
    partial_dir = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)  # left by a process that was killed
    check_disk(output_dir, need_bytes)
    partial_dir.mkdir()
    try:
        yield partial_dir
        for path in sorted(partial_dir.rglob("*")):
            if path.is_file():
                sync(path)
        sync(partial_dir)
        partial_dir.rename(output_dir)
        sync(output_dir.parent)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


def check_new(output_dir: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ModelError: `output_dir` is there and not an empty folder, or is a link, which no rename replaces.
    """
    if output_dir.is_symlink() or (output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))):
        raise ModelError(
            "the output folder is there already",
            where=f"--output_dir {output_dir}",
            got=_described(output_dir),
            allowed="a new or empty folder",
            fix=f"look into it; if nothing there is needed: rm -r {output_dir}, then the same command again",
        )


def _described(output_dir: Path) -> str:
    if output_dir.is_symlink():
        return f"a link to {output_dir.readlink()}"
    return ", ".join(sorted(path.name for path in output_dir.iterdir())[:6]) if output_dir.is_dir() else "a file"


def check_disk(output_dir: Path, need_bytes: int) -> None:
    """Find out before heavy work whether the result fits.

    Raises:
        ModelError: the file system of `output_dir` has less free space than `need_bytes`.
    """
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise ModelError(
            "the disk has not enough room for the result",
            where=f"--output_dir {output_dir}",
            got=f"{free / GIB:.2f} GiB free",
            allowed=f"{need_bytes / GIB:.2f} GiB",
            fix="free some space, or choose a folder on another disk",
        )
