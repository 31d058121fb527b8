"""Folders built once: whole or absent, whoever is killed, however many want them."""

import subprocess
import sys
from pathlib import Path

import pytest

from anima.data.cache import build_once
from anima.errors import DataError

BUILDER = """
import sys, time
from pathlib import Path
from anima.data.cache import build_once

def build(folder):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("built ")
    (folder / "part").write_text("1")
    time.sleep(float(sys.argv[2]))
    (folder / "rest").write_text("2")

print(build_once(Path(sys.argv[1]), build))
"""


def _start(folder: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def _build(folder: Path) -> None:
    (folder / "part").write_text("1")
    (folder / "rest").write_text("2")


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_call_builds_and_the_next_finds(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "key"
    assert build_once(folder, _build) is True
    assert build_once(folder, lambda _: pytest.fail("built again")) is False
    assert _names(folder) == ["part", "rest"]
    assert _names(folder.parent) == ["key", "key.lock"]


def test_an_error_leaves_nothing_and_the_next_call_builds(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "part").write_text("1")
        raise DataError("wrong row")

    for _ in range(2):
        with pytest.raises(DataError, match="wrong row"):
            build_once(tmp_path / "key", fail)
        assert _names(tmp_path) == ["key.lock"]
    assert build_once(tmp_path / "key", _build) is True


def test_processes_that_come_together_build_once(tmp_path: Path) -> None:
    processes = [_start(tmp_path / "key", 0.5) for _ in range(3)]
    answers = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert answers == ["False", "False", "True"]
    assert (tmp_path / "key.log").read_text() == "built "
    assert _names(tmp_path / "key") == ["part", "rest"]


def test_a_killed_builder_neither_blocks_nor_leaves_half(tmp_path: Path) -> None:
    process = _start(tmp_path / "key", 60)
    while not list(tmp_path.glob("key.tmp-*/part")):
        assert process.poll() is None
    process.kill()
    process.communicate(timeout=10)
    assert not (tmp_path / "key").exists()
    assert len(list(tmp_path.glob("key.tmp-*"))) == 1
    assert build_once(tmp_path / "key", _build) is True
    assert _names(tmp_path) == ["key", "key.lock", "key.log"]


def test_a_cache_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written") as caught:
        build_once(tmp_path / "file" / "key", _build)
    assert caught.value.where == "--data_cache_dir"


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="cannot be written") as caught:
        build_once(tmp_path / "key", fill)
    assert caught.value.got == f"{tmp_path}: No space left on device"
    assert _names(tmp_path) == ["key.lock"]


def test_without_locks_the_work_is_done_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks: a faster process may put its folder there first."""
    import fcntl

    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build_once(tmp_path / "key", _build) is True

    def overtaken(folder: Path) -> None:
        _build(folder)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "faster").write_text("")

    assert build_once(tmp_path / "other", overtaken) is False
    assert _names(tmp_path / "other") == ["faster"]
