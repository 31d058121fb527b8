"""W&B for real: offline runs read back with wandb's own reader, failures at the start and later, sweeps, secrets."""

import json
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import OutputConfig
from anima.tracking.metrics_file import read_metrics
from anima.tracking.wandb_tracker import artifact_name, run_name

REPOSITORY = Path(__file__).resolve().parents[2]
CANARY = "canary7890123456789012345678901234567890"
BOUND_SECONDS = 30.0

HEAD = """
    import math, os, sys, time
    from pathlib import Path
    from anima.config.schema import OutputConfig
    from anima.errors import TrackingError
    from anima.tracking.tracker import Sample, start_tracker

    def children():
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]

    def start(run_id=None, config=None, **options):
        output = OutputConfig(output_dir="run dir", tracker="wandb", wandb_project="proj", **options)
        options = {"learning_rate": 1e-4, "train_files": ("a.json", "b.json"), "max_steps": None}
        return start_tracker(output, resolved_config=config or options, is_main=True, run_id=run_id)
"""


@dataclass(frozen=True)
class Done:
    """A finished child process."""

    stdout: str
    stderr: str
    seconds: float
    folder: Path

    def run(self) -> dict[str, Any]:
        """The newest offline run, as wandb's reader tells it: records by type."""
        path = self.folder / "run dir" / "wandb" / "latest-run"
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=environment)
        records: dict[str, list[Any]] = {}
        for line in told.stdout.splitlines():
            record = json.loads(line)
            records.setdefault(record["type"], []).append(record[record["type"]])
        config: dict[str, Any] = {}
        for change in [*(run["config"] for run in records["run"]), *records.get("config", [])]:
            config |= change.get("update", {})
        summary: dict[str, Any] = {}
        for change in records.get("summary", []):
            summary |= change.get("update", {})
        return {**records, "config": config, "summary": summary, "history": [r["item"] for r in records["history"]]}


def execute(folder: Path, body: str, **environment: str) -> Done:
    """Run `HEAD` and `body` with a clean environment, in a home folder of its own."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HEAD) + textwrap.dedent(body)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(REPOSITORY), **environment},
    )
    assert done.returncode == 0, done.stderr
    return Done(done.stdout, done.stderr, time.monotonic() - start, folder)


WHOLE_RUN = """
    Path("adapter").mkdir()
    Path("adapter/adapter_model.safetensors").write_bytes(b"0" * 1000)
    Path("adapter/adapter_config.json").write_text("{}")
    tracker = start(wandb_log_adapter=True, run_name="我的 run/1")
    tracker.log(1, {"train/loss": 2.5})
    tracker.log(2, {"train/loss": math.nan, "eval/loss": math.inf})
    tracker.log(1, {"train/loss": 2.25})  # a restart goes back to its checkpoint
    tracker.log_samples(2, [Sample("你是谁？", "我是 Anima。", label="tuned"), Sample("q", "a")])
    tracker.log_samples(2, [])
    tracker.summary({"steps": 2, "eval_loss_best": math.nan, "peak_memory_gib": (1.0, 2.0)})
    tracker.log_adapter(Path("adapter"))
    print(tracker.run_id)
    tracker.finish(3)
    tracker.finish(3)
    assert not children(), "wandb's service is still there"
"""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Done:
    secrets = {"WANDB_API_KEY": CANARY, "HF_TOKEN": f"hf_{CANARY}", "OPENAI_API_KEY": f"sk-{CANARY}"}
    return execute(tmp_path_factory.mktemp("wandb"), WHOLE_RUN, WANDB_MODE="offline", **secrets)


@pytest.fixture(scope="module")
def records(whole_run: Done) -> dict[str, Any]:
    return whole_run.run()


def test_offline_run_holds_everything(whole_run: Done, records: dict[str, Any]) -> None:
    (record,) = records["run"]
    assert (record["project"], record["display_name"]) == ("proj", "我的 run/1")
    assert record["run_id"] == whole_run.stdout.strip()
    options = {name: value for name, value in records["config"].items() if name != "_wandb"}
    assert options == {"learning_rate": 1e-4, "train_files": ["a.json", "b.json"], "max_steps": None}
    assert records["exit"][0]["exit_code"] == 3
    assert (records["summary"]["steps"], records["summary"]["peak_memory_gib"]) == (2, [1, 2])


def test_step_is_the_axis_and_may_go_back(records: dict[str, Any]) -> None:
    rows = [(row["step"], row.get("train/loss"), row.get("eval/loss")) for row in records["history"]]
    assert rows == [(1, 2.5, None), (2, "NaN", "Infinity"), (1, 2.25, None), (2, None, None)]
    axes = {metric.get("glob_name") or metric["name"]: metric.get("step_metric") for metric in records["metric"]}
    assert axes["*"] == "step"


def test_samples_are_a_table(whole_run: Done) -> None:
    (path,) = whole_run.folder.glob("run dir/wandb/latest-run/files/media/table/samples_*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "label", "prompt", "answer"]
    assert table["data"] == [[2, "tuned", "你是谁？", "我是 Anima。"], [2, "", "q", "a"]]


def test_adapter_is_a_model_artifact_without_a_second_copy(whole_run: Done, records: dict[str, Any]) -> None:
    (artifact,) = [entry for entry in records["artifact"] if entry["type"] == "model"]
    assert artifact["name"] == "run-1-adapter"
    files = {entry["path"]: entry["local_path"] for entry in artifact["manifest"]["contents"]}
    assert set(files) == {"adapter_model.safetensors", "adapter_config.json"}
    assert all(Path(path).is_relative_to(whole_run.folder / "adapter") for path in files.values())


def test_local_metrics_are_written_as_well(whole_run: Done) -> None:
    assert [row["step"] for row in read_metrics(whole_run.folder / "run dir" / "metrics.jsonl")] == [1, 2, 1]
    assert len((whole_run.folder / "run dir" / "samples.jsonl").read_text().splitlines()) == 2


def test_no_file_and_no_output_holds_a_secret(whole_run: Done) -> None:
    assert CANARY not in whole_run.stdout + whole_run.stderr
    files = [path for path in whole_run.folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_adapter_stays_at_home_unless_asked_for(tmp_path: Path) -> None:
    body = """
        tracker = start(run_id="abc123")
        assert tracker.run_id == "abc123"
        Path("adapter").mkdir()
        tracker.log_adapter(Path("adapter"))
        tracker.log(5, {"a": 1.0})
        tracker.finish()
    """
    done = execute(tmp_path, body, WANDB_MODE="offline", WANDB_PROJECT="other")
    run = done.run()
    assert "artifact" not in run
    assert run["run"][0]["run_id"] == "abc123"
    assert run["run"][0]["display_name"] == "run dir"
    assert run["run"][0]["project"] == "proj"
    assert "WANDB_PROJECT=other is overruled by --wandb_project proj" in done.stderr


def test_in_a_sweep_wandb_owns_project_id_and_values(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("wandb_version: 1\nlearning_rate: {value: 0.5}\n")
    sweep = {"WANDB_SWEEP_ID": "sw1", "WANDB_RUN_ID": "r1", "WANDB_PROJECT": "pp", "WANDB_ENTITY": "ee"}
    parameters = {"WANDB_SWEEP_PARAM_PATH": str(tmp_path / "sweep.yaml")}
    body = """
        tracker = start(run_id="old")
        tracker.log(1, {"eval/loss": 1.0})
        print(tracker.run_id)
        tracker.finish()
    """
    done = execute(tmp_path, body, WANDB_MODE="offline", **sweep, **parameters)
    run = done.run()
    record = run["run"][0]
    assert (record["run_id"], record["project"], record["sweep_id"]) == ("r1", "pp", "sw1")
    assert run["config"]["learning_rate"] == 0.5
    assert done.stdout.strip() == "r1"
    assert "Ignoring" not in done.stderr
    assert "overruled" not in done.stderr


def test_lost_service_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    body = """
        import signal
        tracker = start()
        tracker.log(1, {"a": 1.0})
        for pid in children():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.3)
        for step in range(2, 8):
            tracker.log(step, {"a": 1.0})
        tracker.summary({"steps": 7})
        tracker.log_samples(7, [Sample("q", "a")])
        tracker.finish()
        print("went on")
    """
    done = execute(tmp_path, body, WANDB_MODE="offline")
    assert done.stdout == "went on\n"
    assert done.stderr.count("training goes on, metrics.jsonl holds all metrics") == 1
    assert len(read_metrics(tmp_path / "run dir" / "metrics.jsonl")) == 7


FAILING_START = """
    try:
        start()
    except TrackingError as error:
        print(error)
    assert not children(), "wandb's service is still there"
    assert not Path("run dir/metrics.jsonl").exists()
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "No API key configured"),
        ({"WANDB_API_KEY": "short"}, "40+ characters"),
        ({"WANDB_MODE": "bogus"}, "offline"),
        ({"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2"}, "refused"),
    ],
)
def test_start_that_fails_names_the_fixes(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    done = execute(tmp_path, FAILING_START, **environment)
    assert "W&B did not start" in done.stdout
    assert reason in done.stdout
    assert all(fix in done.stdout for fix in ("WANDB_MODE=offline", "wandb login", "--tracker jsonl"))
    assert CANARY not in done.stdout
    assert done.seconds < BOUND_SECONDS


def test_secret_in_an_option_is_refused_before_wandb_sees_it(tmp_path: Path) -> None:
    body = """
        try:
            start(config={"seed": 1, "model_name_or_path": "https://hub/x?token=" + os.environ["HF_TOKEN"]})
        except TrackingError as error:
            print(error)
    """
    done = execute(tmp_path, body, WANDB_MODE="offline", HF_TOKEN=CANARY)
    assert "--model_name_or_path" in done.stdout
    assert CANARY not in done.stdout + done.stderr
    assert not (tmp_path / "run dir" / "wandb").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart", "quickstart-adapter"),
        ("a b/c:d", "a-b-c-d-adapter"),
        ("我的", "run-adapter"),
        ("x" * 300, "x" * 120 + "-adapter"),
    ],
)
def test_artifact_names_are_what_wandb_allows(name: str, expected: str) -> None:
    assert artifact_name(name) == expected


def test_run_name_comes_from_the_flag_then_the_variable_then_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_NAME", raising=False)
    assert run_name(OutputConfig(output_dir="out/quickstart/")) == "quickstart"
    monkeypatch.setenv("WANDB_NAME", "variable")
    assert run_name(OutputConfig(output_dir="out/quickstart")) == "variable"
    assert run_name(OutputConfig(output_dir="out/quickstart", run_name="flag")) == "flag"
