"""When a run's numbers are worth a warning, and when they end it."""

import json
import math
from pathlib import Path

import pytest

from anima.errors import TrainingError
from anima.train.health import MAX_SKIPPED_IN_A_ROW, Health, write_report


def test_only_many_skips_in_a_row_stop(tmp_path: Path) -> None:
    health = Health()
    for step in range(1, 20):
        skipped = step % MAX_SKIPPED_IN_A_ROW != 0
        health.step_done(math.inf if skipped else 1.0, skipped=skipped)
        health.check_skips(step, tmp_path, None)
    assert health.skipped == 16
    health.step_done(1.0, skipped=False)
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        health.step_done(math.inf, skipped=True)
    health.check_skips(24, tmp_path, None)
    health.step_done(math.inf, skipped=True)
    with pytest.raises(TrainingError, match="in 5 steps in a row") as caught:
        health.check_skips(25, tmp_path / "step-25.json", Path("runs/a/checkpoints/step-20"))
    assert "--resume runs/a/checkpoints/step-20" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_loss_far_above_the_last_ones_is_told_once_there_are_enough() -> None:
    health = Health()
    assert all(health.leap(2.0 + 0.01 * (-1) ** step) is None for step in range(19))
    assert health.leap(9.0) is None  # the twentieth: nineteen before it are too few to judge
    health = Health()
    health.step_done(0.5, skipped=False)
    for step in range(30):
        assert health.leap(2.0 + 0.01 * (-1) ** step) is None
    assert health.leap(2.05) is None
    told = health.leap(2.5)
    assert told is not None
    assert "leapt to 2.5000 from a mean of 2.00" in told
    assert "gradient norm 0.5, usually 0.5" in told
    assert health.leap(math.nan) is None


def test_a_checkpoint_carries_it_all() -> None:
    health = Health()
    for step in range(130):
        health.step_done(math.inf if step == 129 else float(step), skipped=step == 129)
        health.leap(float(step))
    again = Health.from_json(json.loads(json.dumps(health.to_json(), allow_nan=False)))
    assert (again.skipped, again.skipped_in_a_row) == (1, 1)
    assert len(again.grad_norms) == 100
    assert list(again.grad_norms)[:99] == list(health.grad_norms)[:99]
    assert math.isnan(again.grad_norms[-1])
    told = health.leap(1e6)
    assert told is not None
    assert again.leap(1e6) == told


def test_the_report_names_rows_and_ranks_and_is_strict_json(tmp_path: Path) -> None:
    health = Health()
    health.step_done(math.inf, skipped=True)
    path = tmp_path / "not_finite" / "step-3.json"
    write_report(path, 3, ["a.jsonl:7"], [1.0, math.nan, math.inf], health)
    report = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert report == {"step": 3, "ranks_with_a_loss_not_finite": [1, 2], "rows": ["a.jsonl:7"], "grad_norms": ["inf"]}
