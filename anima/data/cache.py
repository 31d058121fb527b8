"""Folders that are built once and then shared: a lock, a temporary folder, a rename. Knows nothing of the content.

A folder that exists is whole. The lock is the kernel's, so it goes with its holder however that ends.
"""

import fcntl
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anima.disk import sync
from anima.errors import DataError

logger = logging.getLogger(__name__)


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Make sure that `folder` exists, whoever builds it; every process of a run may call this at the same time.

    Args:
        folder: The folder; its parent is made if it is missing.
        build: Fills an empty folder; what it raises is raised here (an OSError as below), and nothing is left behind.

    Returns:
        Whether this process built it.

    Raises:
        DataError: The folder cannot be written, or the disk is full.
    """
    try:
        if folder.is_dir():
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.lock", "a") as lock_file, _locked(lock_file.fileno(), folder) as alone:
            if folder.is_dir():
                return False
            if alone:
                for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a builder that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
            return _build(folder, build)
    except OSError as error:  # no right to write, or a disk that fills up while the folder is built
        raise DataError(
            "the cache folder cannot be written",
            where="--data_cache_dir",
            got=f"{folder.parent}: {error.strerror or error}",
            fix="name a folder of yours, on a disk with room, with --data_cache_dir",
        ) from error


@contextmanager
def _locked(descriptor: int, folder: Path) -> Iterator[bool]:
    """Hold the lock; False where the file system has none, and then work may be done twice but never half."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process to prepare %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        logger.warning("%s has no file locks (%s): processes may prepare the data twice", folder.parent, error.strerror)
        yield False
        return
    try:
        yield True
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _build(folder: Path, build: Callable[[Path], None]) -> bool:
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        build(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            return False  # without a lock, another process was faster; its folder is as good
        sync(folder.parent)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
