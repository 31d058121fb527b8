"""Which trackers a config starts, on which rank, and that the group passes everything on."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import pytest

from anima.config.schema import OutputConfig
from anima.errors import TrackingError
from anima.tracking.metrics_file import JsonlTracker
from anima.tracking.tracker import NullTracker, Sample, Tracker, TrackerGroup, check_tracker, start_tracker


def output(folder: Path, tracker: Literal["wandb", "jsonl", "none"]) -> OutputConfig:
    return OutputConfig(output_dir=str(folder / "run"), tracker=tracker)


class Recorder:
    """Writes down every call."""

    def __init__(self, run_id: str | None = None) -> None:
        self.run_id = run_id
        self.calls: list[tuple[object, ...]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls.append(("log", step, dict(metrics)))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self.calls.append(("log_samples", step, *samples))

    def summary(self, values: Mapping[str, object]) -> None:
        self.calls.append(("summary", dict(values)))

    def log_adapter(self, folder: Path) -> None:
        self.calls.append(("log_adapter", folder))

    def finish(self, exit_code: int = 0) -> None:
        self.calls.append(("finish", exit_code))


def use(tracker: Tracker) -> None:
    tracker.log(1, {"train/loss": 2.0})
    tracker.log_samples(1, [Sample("q", "a")])
    tracker.summary({"steps": 1})
    tracker.log_adapter(Path("adapter"))
    tracker.finish(4)


def test_group_passes_every_call_to_every_tracker() -> None:
    first, second = Recorder(), Recorder("id2")
    group = TrackerGroup((first, second))
    use(group)
    assert first.calls == second.calls
    assert first.calls == [
        ("log", 1, {"train/loss": 2.0}),
        ("log_samples", 1, Sample("q", "a")),
        ("summary", {"steps": 1}),
        ("log_adapter", Path("adapter")),
        ("finish", 4),
    ]
    assert group.run_id == "id2"
    assert TrackerGroup((first,)).run_id is None


@pytest.mark.parametrize(("tracker", "is_main"), [("none", True), ("jsonl", False), ("wandb", False)])
def test_other_ranks_and_none_leave_no_trace(
    tmp_path: Path, tracker: Literal["wandb", "jsonl", "none"], is_main: bool
) -> None:
    started = start_tracker(output(tmp_path, tracker), resolved_config={}, is_main=is_main)
    use(started)
    assert isinstance(started, NullTracker)
    assert list(tmp_path.iterdir()) == []


def test_jsonl_writes_metrics_and_samples_without_wandb(tmp_path: Path) -> None:
    loaded = "wandb" in sys.modules
    started = start_tracker(output(tmp_path, "jsonl"), resolved_config={"hf_token": "any"}, is_main=True)
    use(started)
    assert isinstance(started, JsonlTracker)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl", "samples.jsonl"]
    assert ("wandb" in sys.modules) == loaded


def test_check_concerns_wandb_on_the_main_rank_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    check_tracker(output(tmp_path, "none"))
    check_tracker(output(tmp_path, "jsonl"))
    check_tracker(output(tmp_path, "wandb"), is_main=False)
    with pytest.raises(TrackingError, match="no API key"):
        check_tracker(output(tmp_path, "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracker(output(tmp_path, "wandb"))
