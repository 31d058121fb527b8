"""What a job does next, case by case; on a real Slurm in tests/slurm."""

import json
from pathlib import Path

import pytest

from anima.cluster.outcome import (
    FRUITLESS,
    Memory,
    Note,
    is_finished,
    judge,
    newest_step,
    read_notes,
    recall,
    remember,
)
from anima.config.cli import parse_config, write_config
from anima.config.schema import Config

BEFORE = Memory("runs/x", step=100)
STOPPED = {0: Note(75, "SIGUSR1 after step 120"), 1: Note(75)}
CUT_OFF = {0: Note(None), 1: Note(None)}


@pytest.mark.parametrize(
    ("notes", "step", "asked", "expected"),
    [
        ({0: Note(0), 1: Note(0)}, 200, "nothing", "done"),
        ({0: Note(0), 1: Note(None)}, 200, "time_limit", "done"),  # results are written; rank 1 was still closing
        (STOPPED, 120, "time_limit", "requeue"),
        (STOPPED, 120, "nothing", "requeue"),  # preempted: Slurm told the ranks alone
        (STOPPED, 120, "end", "leave"),
        (CUT_OFF, 120, "end", "leave"),
        (CUT_OFF, 120, "nothing", "requeue"),
        ({}, 100, "nothing", "requeue"),
        ({0: Note(2, "no such flag")}, 100, "nothing", "give_up"),
        ({0: Note(3, "not finite")}, 120, "nothing", "give_up"),
        ({0: Note(1), 1: Note(7, "out of memory")}, 100, "nothing", "give_up"),
        ({0: Note(1), 1: Note(130)}, 100, "nothing", "give_up"),
        ({0: Note(1), 1: Note(None)}, 100, "nothing", "requeue"),
    ],
)
def test_each_way_to_end_has_its_consequence(notes: dict[int, Note], step: int, asked: str, expected: str) -> None:
    verdict = judge(notes, BEFORE, step, asked)  # type: ignore[arg-type]
    assert verdict.next == expected
    assert verdict.why


def test_starts_without_progress_are_counted_and_end() -> None:
    memory = BEFORE
    seen = []
    for _ in range(FRUITLESS):
        verdict = judge(CUT_OFF, memory, 100, "nothing")
        memory = Memory("runs/x", 100, verdict.fruitless)
        seen.append(verdict.next)
    assert seen == ["requeue"] * (FRUITLESS - 1) + ["give_up"]
    assert judge(CUT_OFF, memory, 101, "nothing").fruitless == 0


def test_a_time_limit_too_short_to_get_anywhere_ends_too() -> None:
    verdict = judge({0: Note(None)}, Memory("runs/x", 0, FRUITLESS - 1), 0, "time_limit")
    assert verdict.next == "give_up"
    assert "3 starts in a row" in verdict.why


def test_what_slurm_ends_does_not_count() -> None:
    assert judge(CUT_OFF, Memory("runs/x", 100, 2), 100, "end").fruitless == 2


def test_the_reason_names_the_rank_and_its_words() -> None:
    verdict = judge({0: Note(None), 5: Note(7, "rank 5 is out of memory\n  fix: ...")}, BEFORE, 100, "nothing")
    assert verdict.why == "exit 7 on rank 5: rank 5 is out of memory; another start would not help"


def test_notes_and_memory_survive_the_disk(tmp_path: Path) -> None:
    (tmp_path / "rank-0").write_text("75\nSIGTERM after step 3\n  got: saved\n")
    (tmp_path / "rank-1").write_text("running\n\n")
    (tmp_path / "rank-11").write_text("-9\n\n")
    (tmp_path / "began").touch()
    assert read_notes(tmp_path) == {0: Note(75, "SIGTERM after step 3\n  got: saved"), 1: Note(None), 11: Note(-9)}
    assert recall(tmp_path) is None
    remember(tmp_path, BEFORE)
    assert recall(tmp_path) == BEFORE


def make_config(folder: Path, *flags: str) -> Config:
    argv = ["--model_name_or_path", "m", "--train_files", "d.jsonl", "--output_dir", str(folder), *flags]
    return parse_config(argv)[0]


def test_finished_is_a_summary_that_nothing_goes_beyond(tmp_path: Path) -> None:
    assert not is_finished(make_config(tmp_path))
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 50}))
    assert not is_finished(make_config(tmp_path))  # whose is it?
    write_config(make_config(tmp_path), tmp_path / "config.yaml")
    assert is_finished(make_config(tmp_path))
    assert is_finished(make_config(tmp_path, "--max_steps", "50"))
    assert not is_finished(make_config(tmp_path, "--max_steps", "51"))
    assert is_finished(make_config(tmp_path, "--logging_steps", "5", "--resume", "auto"))  # nothing else is learned
    for other in (("--num_train_epochs", "3"), ("--learning_rate", "1e-5"), ("--lora_r", "8")):
        assert not is_finished(make_config(tmp_path, *other))
    write_config(make_config(tmp_path, "--max_steps", "50"), tmp_path / "config.yaml")
    assert not is_finished(make_config(tmp_path))  # a whole epoch is asked for now
    write_config(make_config(tmp_path), tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / "step-60").mkdir(parents=True)  # a longer run, cut off
    assert newest_step(str(tmp_path)) == 60
    assert not is_finished(make_config(tmp_path))
    (tmp_path / "summary.json").write_text("{")
    assert not is_finished(make_config(tmp_path))
