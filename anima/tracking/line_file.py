"""An append-only text file whose writer outlives a full disk: what cannot be written now is tried again later.

A line counts once its newline is there. Knows nothing of what the lines hold.
"""

import os
from collections import deque
from pathlib import Path

from anima.tracking.terminal import warn

_TAIL_BYTES = 1 << 16


class LineFile:
    """Whole lines at the end of a file, each handed to the operating system as soon as it is there.

    Args:
        path: The file; created with the first line, appended to if it exists. A torn last line of an earlier process
            that was killed is cut off.
        max_pending_lines: Lines kept while the file cannot be written; beyond that the oldest are lost, and counted.
    """

    def __init__(self, path: Path, max_pending_lines: int = 10_000) -> None:
        """Nothing is opened yet."""
        self.path = path
        self.num_lost_lines = 0
        self._max_pending_lines = max_pending_lines
        self._pending: deque[bytes] = deque()
        self._descriptor: int | None = None
        self._warned = False

    def open(self) -> None:
        """Open the file now, to find out early that it cannot be written.

        Raises:
            OSError: No permission, no such folder, a read-only or full disk.
        """
        if self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _cut_torn_line(descriptor)
            except OSError:
                os.close(descriptor)
                raise
            self._descriptor = descriptor

    def append(self, line: str) -> None:
        """Write one line (without its newline); if the disk refuses, warn once and keep it for later."""
        # A lone surrogate in a model's answer must not cost the line; JSON's own escapes never need this.
        self._pending.append(line.encode("utf-8", errors="backslashreplace") + b"\n")
        if len(self._pending) > self._max_pending_lines:
            self._pending.popleft()
            self.num_lost_lines += 1
        self._flush()

    def close(self) -> None:
        """Try once more to write what is pending, say what is lost, and close; a second call does nothing."""
        self._flush()
        if unwritten := self.num_lost_lines + len(self._pending):
            warn(f"{self.path} lacks {unwritten} lines that could not be written")
        self.num_lost_lines, self._pending = 0, deque()
        self._shut()

    def _flush(self) -> None:
        if not self._pending:
            return
        try:
            self.open()
            while self._pending:
                self._write(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            # Opening again cuts the torn line, so the whole line can be written afresh.
            self._shut()
            if not self._warned:
                self._warned = True
                warn(f"cannot write {self.path}: {error.strerror}; training goes on, lines are kept and tried again")

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _shut(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            os.close(descriptor)
        except OSError as error:
            # Network file systems report a full disk or quota here.
            warn(f"closing {self.path}: {error.strerror}; its last lines may be missing")


def _cut_torn_line(descriptor: int) -> None:
    """Cut the file behind its last newline."""
    size = os.fstat(descriptor).st_size
    end = size
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)
