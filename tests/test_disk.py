"""Files replaced whole: what readers, a full disk, a kill and another writer see."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anima.disk import replace_file, sync


def test_readers_see_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with path.open("rb") as reader:
        replace_file(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    replace_file(path, b"old")
    monkeypatch.setattr(os, where, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_an_error_and_stays_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "no" / "file", b"")
    assert list(tmp_path.iterdir()) == []


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, order = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.fstat(descriptor).st_size) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda source, target: order.append("renamed") or replace(source, target))
    replace_file(path, b"twelve bytes")
    assert order == [12, "renamed"]


def test_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "file"
    plain.touch()
    replace_file(path, b"")
    assert path.stat().st_mode == plain.stat().st_mode


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Four processes write 200 KB of their own letter until they are killed: every read is of one letter."""
    path = tmp_path / "file"
    replace_file(path, b"?" * 200_000)
    forever = "import sys; from pathlib import Path; from anima.disk import replace_file\nwhile True: replace_file(*A)"
    forever = forever.replace("*A", "Path(sys.argv[1]), sys.argv[2].encode() * 200_000")
    writers = [subprocess.Popen([sys.executable, "-c", forever, str(path), letter]) for letter in "abcd"]
    try:
        seen = set()
        while len(seen) < 4:
            content = path.read_bytes()
            assert content == content[:1] * 200_000
            seen |= {content[:1]} - {b"?"}
            assert all(writer.poll() is None for writer in writers)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
    content = path.read_bytes()
    assert content == content[:1] * 200_000


def test_sync_takes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    sync(tmp_path / "file")
    sync(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "missing")
