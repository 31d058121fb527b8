"""Notes that ranks leave for the job they belong to: launchers turn every exit status into 1."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = """
import os, sys
from anima.entry import run_command
from anima.errors import ConfigError, OutOfMemory, RunStopped

def command(argv):
    if argv[0] == "mistake":
        raise ConfigError("no such thing", fix="another", got="name-\\udcff")
    if argv[0] == "stop":
        raise RunStopped("SIGUSR1 after step 3", got="saved")
    if argv[0] == "memory":
        raise OutOfMemory("too large")
    if argv[0] == "bug":
        raise ZeroDivisionError
    if argv[0] == "help":
        sys.exit(0)
    if argv[0] == "hang":
        os._exit(8)

run_command(command)
"""


@pytest.mark.parametrize(
    ("what", "status", "first_lines"),
    [
        ("nothing", 0, ["0", ""]),
        ("mistake", 2, ["2", "no such thing"]),
        ("stop", 75, ["75", "SIGUSR1 after step 3"]),
        ("memory", 7, ["7", "too large"]),
        ("bug", 1, ["1", ""]),
        ("help", 0, ["0", ""]),
        ("hang", 8, ["running", ""]),
    ],
)
def test_each_end_leaves_its_note(what: str, status: int, first_lines: list[str], tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(REPOSITORY), "ANIMA_EXIT_DIR": str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, what], env=environment, check=False, capture_output=True)
    assert done.returncode == status
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0"]
    assert (tmp_path / "rank-0").read_text().splitlines()[:2] == first_lines


def test_a_folder_that_is_gone_is_a_warning(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(REPOSITORY), "ANIMA_EXIT_DIR": str(tmp_path / "gone")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "nothing"], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "the job may not learn how this run ended" in done.stderr
