"""What is tried next: a grid's points in order, random ones in their bounds, and TPE finds a valley."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.errors import ConfigError
from anima.sweeps.journal import Trial
from anima.sweeps.sampler import check_local, propose
from anima.sweeps.sweep_file import Sweep, read_sweep

HEAD = "program: launch/train.py\nmetric: {name: eval/loss, goal: minimize}\n"
RANGES = """method: %s
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0e-1}
  lora_r: {distribution: int_uniform, min: 4, max: 9}
  lora_dropout: {distribution: q_uniform, min: 0.0, max: 0.3, q: 0.1}
  optimizer: {values: [adamw_torch, adamw_8bit]}
  seed: {value: 7}
"""


def sweep_of(tmp_path: Path, text: str) -> Sweep:
    (tmp_path / "sweep.yaml").write_text(HEAD + text)
    return read_sweep(str(tmp_path / "sweep.yaml"))


def play(sweep: Sweep, count: int, loss: Callable[[dict[str, Any]], float], seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    for number in range(1, count + 1):
        if (chosen := propose(sweep, trials, seed)) is None:
            break
        trials.append(Trial(number, chosen, "finished", metric=loss(chosen)))
    return trials


def test_a_grid_is_walked_once_in_order(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, "method: grid\nparameters: {lora_r: {values: [1, 2]}, packing: {values: [true, false]}}")
    trials = play(sweep, 9, lambda values: 0.0)
    points = [(trial.parameters["lora_r"], trial.parameters["packing"]) for trial in trials]
    assert points == [(1, True), (1, False), (2, True), (2, False)]


def test_random_values_stay_in_their_bounds_and_repeat_with_the_seed(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, RANGES % "random")
    trials = play(sweep, 40, lambda values: 0.0)
    assert [t.parameters for t in trials] == [t.parameters for t in play(sweep, 40, lambda values: 0.0)]
    assert [t.parameters for t in trials] != [t.parameters for t in play(sweep, 40, lambda values: 0.0, seed=1)]
    rates = [trial.parameters["learning_rate"] for trial in trials]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert 5 < sum(rate < 1e-3 for rate in rates) < 35  # half of them on a logarithmic scale, one in a hundred else
    assert {trial.parameters["lora_r"] for trial in trials} == {4, 5, 6, 7, 8, 9}
    assert {trial.parameters["lora_dropout"] for trial in trials} == {0.0, 0.1, 0.2, 0.3}
    assert {trial.parameters["optimizer"] for trial in trials} == {"adamw_torch", "adamw_8bit"}
    assert {trial.parameters["seed"] for trial in trials} == {7}


def test_bayes_finds_the_valley_that_random_search_only_brushes(tmp_path: Path) -> None:
    def loss(values: dict[str, Any]) -> float:
        return (math.log10(values["learning_rate"]) + 3.2) ** 2 + 0.1 * abs(values["lora_r"] - 6)

    def late(method: str) -> float:
        """Mean loss of the trials after the first twenty, over five seeds."""
        sweep = sweep_of(tmp_path, RANGES % method)
        losses = [trial.metric or 0.0 for seed in range(5) for trial in play(sweep, 40, loss, 1000 * seed)[20:]]
        return sum(losses) / len(losses)

    assert late("bayes") < 0.5 * late("random")


def test_maximize_is_minded(tmp_path: Path) -> None:
    text = (HEAD + RANGES % "bayes").replace("minimize", "maximize").replace("eval/loss", "eval/rewards/accuracies")
    (tmp_path / "sweep.yaml").write_text(text)
    sweep = read_sweep(str(tmp_path / "sweep.yaml"))
    trials = play(sweep, 40, lambda values: -((math.log10(values["learning_rate"]) + 1.5) ** 2))
    late = [trial.parameters["learning_rate"] for trial in trials[25:]]
    assert sum(rate > 1e-3 for rate in late) > 10


def test_running_failed_and_unmeasured_trials_are_borne(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, RANGES % "bayes")
    trials = play(sweep, 8, lambda values: 1.0)
    first = trials[0].parameters
    trials += [
        Trial(9, first, "running"),
        Trial(10, first, "failed"),
        Trial(11, first, "finished", metric=None),
        Trial(12, first, "finished", metric=math.nan),
        Trial(13, first, "stopped"),
    ]
    assert propose(sweep, trials, 0) is not None


def test_what_only_wandb_can_choose_is_refused_here(tmp_path: Path) -> None:
    for spec in ("{values: [1, 2], probabilities: [0.9, 0.1]}", "{distribution: normal, mu: 8, sigma: 2}"):
        with pytest.raises(ConfigError) as caught:
            check_local(sweep_of(tmp_path, f"method: random\nparameters:\n  lora_r: {spec}\n"))
        assert "only W&B chooses" in str(caught.value)
        assert "sweep.yaml:5" in str(caught.value)
