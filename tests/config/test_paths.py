"""Home folders: those that are there, and those that are not, as a function and through commands."""

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.config.paths import expanded
from anima.errors import ConfigError

NOBODY = "~no-such-user/x"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with a user of its own number: neither HOME nor an entry in the list of users."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_homes_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/x") == Path("/somewhere/x")
    assert expanded("~") == Path("/somewhere")
    assert expanded(Path("~/x")) == Path("/somewhere/x")
    root = pwd.getpwuid(0)
    assert expanded(f"~{root.pw_name}/x") == Path(root.pw_dir, "x")
    for name in ("x", "/a/~b", "a~", "./~no-such-user/x"):
        assert expanded(name) == Path(name)


def test_a_user_who_is_not_there() -> None:
    with pytest.raises(ConfigError) as caught:
        expanded(NOBODY, "--output_dir")
    error = caught.value
    assert (error.what, error.where) == ("there is no user 'no-such-user' on this machine", "--output_dir")
    assert (error.got, error.fix) == ("~no-such-user", "write the path out, or ~/… for your own folder")
    with pytest.raises(ConfigError) as caught:
        expanded(NOBODY)
    assert caught.value.where == NOBODY


@pytest.mark.usefixtures("no_home")
def test_a_user_without_a_home() -> None:
    assert os.path.expanduser("~/x") == "~/x"  # the fixture does what it says
    with pytest.raises(ConfigError, match="the folder of this user is not known") as caught:
        expanded("~/x")
    assert caught.value.fix == "set HOME, or write the path out"


NEEDED = ["--model_name_or_path", "m", "--train_files", "t.jsonl"]


@pytest.mark.parametrize(
    ("script", "argv", "where"),
    [
        ("launch/train.py", [*NEEDED, "--output_dir", NOBODY], "--output_dir"),
        ("launch/train.py", ["--config", NOBODY], "--config"),
        ("launch/train.py", [*NEEDED, "--output_dir", "o", "--deepspeed", NOBODY, "--dry_run"], "--deepspeed"),
        ("launch/chat.py", ["--adapter", NOBODY, "--prompt", "hi"], "--adapter"),
        ("launch/chat.py", ["--adapter", f"mine={NOBODY}", "--prompt", "hi"], "--adapter"),
        ("launch/prequantize.py", ["--model_name_or_path", "m", "--output_dir", NOBODY], "--output_dir"),
        ("launch/arena.py", ["report", "--arena", NOBODY], "--arena"),
        ("launch/sweep.py", ["check", NOBODY], NOBODY),
        ("launch/checkpoint.py", ["list", NOBODY], NOBODY),
    ],
)
def test_commands_say_it_in_a_few_lines(launch: Callable[..., Any], script: str, argv: list[str], where: str) -> None:
    done = launch(argv, script=script)
    assert done.returncode == 2, done.stderr
    lines = [line.split(":", 1) for line in done.stderr.splitlines() if line.startswith(("error", "  "))]
    told = {name.strip(): text.strip() for name, text in lines}
    assert told.pop("error") == "there is no user 'no-such-user' on this machine"
    assert told == {
        "where": where,
        "got": "~no-such-user",
        "allowed": "~ and ~user for home folders that exist; ./~name for a file of such a name",
        "fix": "write the path out, or ~/… for your own folder",
    }
    assert "Traceback" not in done.stderr
