"""Append-only files of JSON lines, the arena's only memory: a process that is killed loses at most a torn last line.

Knows nothing of what the lines hold.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType

from anima.disk import replace_file
from anima.errors import ConfigError, DataError


class LineWriter:
    """Appends objects to a file, one process at a time; a torn last line of a killed one is cut off first.

    A line is handed to the operating system before `append` returns, so that only a crash of the machine could lose
    it. Threads may share a writer.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending, making the folder.

        Raises:
            ConfigError: another process writes this file now, or the folder cannot be written.
        """
        self._lock = Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(
                "the arena's folder cannot be written", where=path, got=error.strerror, fix="choose a folder of yours"
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ConfigError(
                "another process is writing this file",
                where=path,
                fix="wait for it, or work in another folder (--arena)",
            ) from None
        size = os.fstat(self._descriptor).st_size
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < size:
            os.ftruncate(self._descriptor, whole)

    def append(self, values: Mapping[str, object]) -> None:
        """Write one object as one line."""
        # A lone surrogate in a model's answer cannot be encoded; it must not cost the line.
        data = (json.dumps(values, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")
        with self._lock:
            while data:
                data = data[os.write(self._descriptor, data) :]

    def close(self) -> None:
        """Close, which lets other processes write."""
        os.close(self._descriptor)

    def __enter__(self) -> "LineWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """`file:line` and object of every whole line; nothing for a file that is not there; a torn last line is left out.

    Raises:
        DataError: a line in the middle is not a JSON object.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                value = json.loads(line)
            except ValueError as error:
                raise _broken(f"{path}:{number}", str(error)) from None
            if not isinstance(value, dict):
                raise _broken(f"{path}:{number}", repr(value)[:60])
            yield f"{path}:{number}", value


def write_whole(path: Path, text: str) -> None:
    """Replace a file: readers see the old text or the whole new one.

    Raises:
        ConfigError: the place cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(errors="replace"))
    except OSError as error:
        raise ConfigError("the file cannot be written", where=path, got=error.strerror) from None


def check_writable(folder: Path) -> None:
    """Find out before heavy work whether files can be written into a folder, which need not be there yet.

    Raises:
        ConfigError: it is a file or below one, or its rights forbid it.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            "the output folder cannot be written",
            where=folder,
            got=f"{existing} is a file" if not existing.is_dir() else f"no right to write into {existing}",
            fix="choose a folder of yours",
        )


def field_of(row: Mapping[str, object], name: str, where: str) -> str:
    """A text of a line that this package wrote.

    Raises:
        DataError: it is missing or no text.
    """
    value = row.get(name)
    if not isinstance(value, str):
        raise DataError(f"the field {name!r} is missing or no text", where=where, got=repr(value)[:60])
    return value


def _broken(where: str, got: str) -> DataError:
    return DataError(
        "a line of the arena's memory is broken",
        where=where,
        got=got,
        allowed="one JSON object a line",
        fix="mend or remove this line; what it held is done again",
    )
