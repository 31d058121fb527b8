"""The early check of W&B: every way to have or lack a key, and the same verdict as wandb itself."""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anima.errors import TrackingError
from anima.tracking.wandb_check import check_wandb

KEY = "canary7890123456789012345678901234567890"
FIXES = ("WANDB_MODE=offline", "wandb login", "WANDB_API_KEY", "--tracker jsonl")

Files = dict[str, str]
Case = tuple[dict[str, str], Files, bool]


def netrc(host: str, password: str = KEY) -> str:
    return f"machine {host}\n  login user\n  password {password}\n"


CASES: dict[str, Case] = {
    # name: (environment, files under the home folder, whether W&B can start)
    "nothing": ({}, {}, False),
    "offline": ({"WANDB_MODE": "offline"}, {}, True),
    "dryrun": ({"WANDB_MODE": "dryrun"}, {}, True),
    "disabled": ({"WANDB_MODE": "disabled"}, {}, True),
    "online": ({"WANDB_MODE": "online"}, {}, False),
    "offline by settings": ({}, {".config/wandb/settings": "[default]\nmode = offline\n"}, True),
    "offline by the folder": ({}, {"wandb/settings": "[default]\nmode = offline\n"}, True),
    "folder overrules user": (
        {},
        {".config/wandb/settings": "[default]\nmode = offline\n", "wandb/settings": "[default]\nmode = online\n"},
        False,
    ),
    "offline by the hidden folder": (
        {},
        {".wandb/settings": "[default]\nmode = offline\n", "wandb/settings": "[default]\nmode = online\n"},
        True,
    ),
    "WANDB_DIR does not count": ({"WANDB_DIR": "x"}, {"x/wandb/settings": "[default]\nmode = offline\n"}, False),
    "variable overrules": ({"WANDB_MODE": "online"}, {"wandb/settings": "[default]\nmode = offline\n"}, False),
    "broken settings": ({}, {"wandb/settings": "mode = offline\n"}, False),
    "config dir": ({"WANDB_CONFIG_DIR": "~/c"}, {"c/settings": "[default]\nmode = offline\n"}, True),
    "key": ({"WANDB_API_KEY": KEY}, {}, True),
    "key with prefix": ({"WANDB_API_KEY": f"local-{KEY}"}, {}, True),
    "web token": ({"WANDB_API_KEY": "head.body.sign"}, {}, True),
    "short key": ({"WANDB_API_KEY": KEY[:39]}, {}, False),
    "key with a blank": ({"WANDB_API_KEY": f"{KEY} {KEY}"}, {}, False),
    "short key before netrc": ({"WANDB_API_KEY": "short"}, {".netrc": netrc("api.wandb.ai")}, False),
    "empty key": ({"WANDB_API_KEY": ""}, {}, False),
    "empty key and netrc": ({"WANDB_API_KEY": ""}, {".netrc": netrc("api.wandb.ai")}, True),
    "netrc": ({}, {".netrc": netrc("api.wandb.ai")}, True),
    "netrc of windows": ({}, {"_netrc": netrc("api.wandb.ai")}, True),
    "netrc elsewhere": ({"NETRC": "~/keys"}, {"keys": netrc("api.wandb.ai")}, True),
    "netrc elsewhere is missing": ({"NETRC": "~/keys"}, {".netrc": netrc("api.wandb.ai")}, False),
    "netrc of another host": ({}, {".netrc": netrc("github.com")}, False),
    "netrc default": ({}, {".netrc": f"default login user password {KEY}\n"}, True),
    "netrc short": ({}, {".netrc": netrc("api.wandb.ai", "short")}, False),
    "netrc broken": ({}, {".netrc": "machine\n"}, False),
    "own server": (
        {"WANDB_BASE_URL": "http://127.0.0.1:9"},
        {".netrc": netrc("127.0.0.1:9")},
        True,
    ),
    "own server, other port": ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, {".netrc": netrc("127.0.0.1:8")}, False),
    "own server, cloud key": ({"WANDB_BASE_URL": "http://127.0.0.1:9"}, {".netrc": netrc("api.wandb.ai")}, False),
    "own server by settings": (
        {},
        {".config/wandb/settings": "[default]\nbase_url = http://127.0.0.1:9\n", ".netrc": netrc("127.0.0.1:9")},
        True,
    ),
    "key in settings": ({}, {".config/wandb/settings": f"[default]\napi_key = {KEY}\n"}, True),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Case], dict[str, str]]:
    """Lays out one case; the home folder is also the working folder."""

    def lay_out(case: Case) -> dict[str, str]:
        environment, files, _ = case
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.chdir(tmp_path)
        return {"HOME": str(tmp_path), **environment}

    return lay_out


@pytest.mark.parametrize("name", CASES)
def test_verdict(name: str, home: Callable[[Case], dict[str, str]]) -> None:
    environment = home(CASES[name])
    if CASES[name][2]:
        check_wandb(environment)
        return
    with pytest.raises(TrackingError) as caught:
        check_wandb(environment)
    message = str(caught.value)
    assert all(fix in message for fix in FIXES)
    assert KEY[:20] not in message


def test_wandb_itself_says_the_same(tmp_path: Path) -> None:
    """One process of wandb judges all cases, from the same files and variables."""
    homes = {}
    for number, (name, (environment, files, _)) in enumerate(CASES.items()):
        folder = tmp_path / str(number)
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(text)
        folder.mkdir(exist_ok=True)
        homes[name] = {"HOME": str(folder), **environment}
    script = """
        import json, os, sys
        import wandb
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth
        base, verdicts = dict(os.environ), {}
        for name, environment in json.load(sys.stdin).items():
            os.environ.clear()
            os.environ.update(base | environment)
            os.chdir(environment["HOME"])
            wandb.teardown()
            settings = wandb_setup.singleton().settings
            try:
                found = settings._offline or settings._noop or wbauth.authenticate_session(
                    host=settings.base_url, source="test", prompt=False, update_session=False
                )
            except wandb.errors.AuthenticationError:
                found = False
            verdicts[name] = bool(found)
        print(json.dumps(verdicts))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=json.dumps(homes),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {name: works for name, (_, _, works) in CASES.items()}


@pytest.mark.parametrize("mode", ["bogus", "OFFLINE", ""])
def test_unknown_mode(mode: str, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="unknown W&B mode"):
        check_wandb({"HOME": str(tmp_path), "WANDB_MODE": mode, "WANDB_API_KEY": KEY})


CHECK = """
    import sys, time
    start = time.perf_counter()
    from anima.config.schema import OutputConfig
    from anima.errors import TrackingError
    from anima.tracking.tracker import check_tracker
    try:
        check_tracker(OutputConfig(output_dir="run", tracker="wandb"))
    except TrackingError as error:
        print(error)
    else:
        print("fine")
    assert "wandb" not in sys.modules and "torch" not in sys.modules
"""


def run_check(cwd: Path, python_path: str, *flags: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(CHECK)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONPATH": python_path, **environment},
    )
    return done.stdout


REPOSITORY = str(Path(__file__).resolve().parents[2])


def test_answer_comes_in_a_second_without_importing_wandb(tmp_path: Path) -> None:
    start = time.perf_counter()
    message = run_check(tmp_path, REPOSITORY)
    assert time.perf_counter() - start < 5  # 0.1 s on an idle machine; the rest is for busy ones
    assert message.startswith("W&B is asked for, but there is no API key")
    assert run_check(tmp_path, REPOSITORY, WANDB_API_KEY=KEY) == "fine\n"


def test_missing_package_is_named_even_beside_a_folder_of_old_runs(tmp_path: Path) -> None:
    (tmp_path / "wandb" / "latest-run").mkdir(parents=True)
    # -S: no site-packages, so no wandb; the folder ./wandb still imports, as a namespace package.
    message = run_check(tmp_path, REPOSITORY, "-S", WANDB_MODE="offline")
    assert message.startswith("the package wandb is not installed")
    assert "pip install wandb" in message
