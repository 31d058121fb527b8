"""Small files that are there whole or not at all, and the wait until something has reached the disk.

Knows neither what is in them nor what an error means: it is an OSError, and a caller that owes users words gives them.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, also after a power cut, whoever else writes it.

    The new file has the rights that the process gives to new files, as if it had been opened and written.

    Args:
        path: In a folder that exists.
        content: All of it; it is written and then renamed, so it should be small.

    Raises:
        OSError: the disk refuses; an older file is untouched, and nothing lies beside it.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # no number of a process: there are other machines
    try:
        with aside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, have reached the disk.

    Raises:
        OSError: they could not.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
