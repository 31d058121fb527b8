"""Hashes of large files: remembered while nothing changed, and never longer."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from anima.data import file_hash as module
from anima.data.file_hash import file_hash


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that counts as large and was written long ago, as far as the clock can tell."""
    monkeypatch.setattr(module, "LARGE_BYTES", 10)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10 * 10**9)
    path = tmp_path / "large"
    path.write_bytes(b"x" * 100)
    return path


def _expected(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_hash_is_remembered(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = file_hash(large, tmp_path / "cache")
    assert first == _expected(large)
    monkeypatch.setattr(module, "_digest", lambda path: pytest.fail("read again"))
    assert file_hash(large, tmp_path / "cache") == first
    with pytest.raises(pytest.fail.Exception):
        file_hash(large, None)


@pytest.mark.parametrize("change", ["content", "stamps kept", "replaced"])
def test_a_change_is_seen(change: str, large: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before, stat = file_hash(large, cache), large.stat()
    if change == "replaced":
        (tmp_path / "other").write_bytes(b"y" * 100)
        (tmp_path / "other").rename(large)
    else:
        large.write_bytes(b"z" * 100)
    if change != "content":  # the same size and the same time of change, as rsync and cp -p leave behind
        os.utime(large, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_hash(large, cache) == _expected(large) != before


def test_a_file_written_a_moment_ago_is_not_remembered(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = max(large.stat().st_mtime_ns, large.stat().st_ctime_ns)
    monkeypatch.setattr(time, "time_ns", lambda: stamp + 10**9)
    file_hash(large, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_damaged_memory_and_small_files(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    file_hash(large, cache)
    (memory,) = (cache / "hashes").iterdir()
    for text in ("", "[]", "{}", '{"sha256": "00"}'):
        memory.write_text(text)
        assert file_hash(large, cache) == _expected(large)
    monkeypatch.setattr(module, "LARGE_BYTES", 1000)
    assert file_hash(large, tmp_path / "none") == _expected(large)
    assert not (tmp_path / "none").exists()
