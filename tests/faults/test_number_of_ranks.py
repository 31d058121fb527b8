"""A run saved on two ranks goes on on one, then on four: the losses of a run that stayed on two."""

from typing import Any

import pytest

NO_DROPOUT = ("--lora_dropout", "0", "--logging_steps", "1")
"""Dropout cannot be the same: another number of ranks draws other masks."""

SAVED = "slow@step:0:3,slow@step:0:6"
"""Half a second in which a checkpoint is written before the kill: these steps take milliseconds."""


def losses(setting: Any, name: str) -> list[float]:
    return [row["train/loss"] for row in setting.metrics(name) if "train/loss" in row]


def test_two_then_one_then_four_ranks_and_three(setting: Any) -> None:
    assert setting.run("stays", *NO_DROPOUT).codes == (0, 0)
    moves = setting.run("moves", *NO_DROPOUT, fault=f"{SAVED},kill@step:0:4")
    assert -9 in moves.codes
    on_one = setting.run("moves", *NO_DROPOUT, "--resume", "auto", ranks=1, fault=f"{SAVED},kill@step:0:7")
    assert "step 2, in" in on_one.output, on_one.output
    assert "restored exactly" in on_one.output
    assert "1 rank(s) instead of 2" in on_one.output
    on_four = setting.run("moves", *NO_DROPOUT, "--resume", "auto", ranks=4)
    assert on_four.codes == (0, 0, 0, 0), on_four.output
    assert "restored exactly" in on_four.output
    expected = losses(setting, "stays")
    assert len(expected) == 8
    assert losses(setting, "moves") == pytest.approx(expected, rel=2e-5)
    # The same folder once more, on a number of ranks that cuts the blocks of 256 in two.
    back = setting.run("moves", *NO_DROPOUT, "--resume", "auto", "--max_steps", "12", ranks=3)
    assert back.codes == (0, 0, 0), back.output
    assert "partly rounded anew" in back.output
    assert "--max_steps is now 12; it was 8" in back.output
    assert losses(setting, "moves")[8] < expected[0]
