"""A checkpoint folder exists only when it is whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anima.train import checkpoint


def write_two_files(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 1000)
    (folder / "inner").mkdir()
    (folder / "inner" / "b.json").write_text('{"step": 1}')


def test_commit_lists_every_file_and_points_latest_to_it(tmp_path: Path) -> None:
    folder = checkpoint.commit(tmp_path, 20, write_two_files, keep=3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"a.bin", "inner/b.json"}
    assert manifest["files"]["a.bin"]["bytes"] == 1000
    assert (tmp_path / "latest").read_text() == "step-20"
    assert checkpoint.problems(folder) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 10, 9, 30):
        checkpoint.commit(tmp_path, step, write_two_files, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 30]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "no manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    folder = checkpoint.commit(tmp_path, 1, write_two_files, keep=1)
    file = folder / "a.bin"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[500] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        (folder / "manifest.json").unlink()
    found = checkpoint.problems(folder)
    assert len(found) == 1
    assert ("manifest" if damage == "no manifest" else "a.bin") in found[0]


def test_a_failing_save_leaves_what_was_there(tmp_path: Path) -> None:
    checkpoint.commit(tmp_path, 1, write_two_files, keep=1)

    def disk_full(folder: Path) -> None:
        write_two_files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.commit(tmp_path, 2, disk_full, keep=1)
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.problems(tmp_path / "step-1") == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".staging")] == []


def test_kill_9_while_writing_leaves_no_checkpoint_that_looks_whole(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from anima.train import checkpoint
def write(folder):
    (folder / "a.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.commit(Path(sys.argv[1]), 5, write, keep=1)
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.steps(tmp_path) == []
    checkpoint.commit(tmp_path, 6, write_two_files, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-6"]
