"""Mistakes in a sweep's file: each is found before any trial, and named with its line and a way to mend it."""

from pathlib import Path

import pytest

from anima.errors import ConfigError
from anima.sweeps.check import check_sweep, combinations, extra_flags
from anima.sweeps.sweep_file import read_sweep

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = """\
program: launch/train.py
method: random
metric: {name: eval/loss, goal: minimize}
parameters:
  learning_rate: {distribution: log_uniform_values, min: 1.0e-5, max: 1.0e-3}
  lora_r: {values: [8, 64]}
  packing: {values: [true, false]}
  train_on: {value: all}
command:
  - ${env}
  - torchrun
  - --nproc_per_node=2
  - ${program}
  - --config=launch/configs/quickstart_sft.yaml
  - --output_dir=runs/sweeps/$WANDB_SWEEP_ID/${WANDB_RUN_ID}
  - ${args}
"""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users are."""
    monkeypatch.chdir(REPOSITORY)
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def check(tmp_path: Path, text: str, **extra: str) -> list[str]:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return check_sweep(read_sweep(str(path)), extra)


def test_a_good_sweep_passes_and_says_what_is_shared(tmp_path: Path) -> None:
    remarks = check(tmp_path, GOOD)
    assert remarks[0] == "3 parameters vary: learning_rate (1e-05 to 0.001), lora_r (2 values), packing (2 values)"
    assert remarks[1] == "tokens: prepared once, shared by all trials"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch" / "sweeps").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_sweeps_pass(path: Path) -> None:
    assert check_sweep(read_sweep(str(path)), {})


MISTAKES = {
    "no such option": ("  lora_r:", "  lora_rank:", ":6", "did you mean lora_r?"),
    "another tool's name": ("  learning_rate:", "  lr:", ":5", "did you mean learning_rate?"),
    "wrong type": ("[8, 64]", "[8, 6.5]", ":6", "a whole number"),
    "text for a number": ("[8, 64]", "[8, many]", ":6", "a whole number"),
    "out of range": ("[8, 64]", "[8, 0]", ":6", "1 or more"),
    "no such choice": ("{value: all}", "{value: everything}", ":8", "assistant or all"),
    "real numbers for a whole one": (
        "{values: [8, 64]}",
        "{distribution: uniform, min: 8.0, max: 64.0}",
        ":6",
        "whole",
    ),
    "a number that YAML reads as text": ("min: 1.0e-5", "min: 1e-5", ":5", "min: 1.0e-05"),
    "the same among values": ("[8, 64]", "[8, 64]}\n  weight_decay: {values: [0.1, 1e-2]", ":7", "0.01"),
    "exponents": ("log_uniform_values", "log_uniform", ":5", "log_uniform_values"),
    "bounds exchanged": ("max: 1.0e-3", "max: 1.0e-6", ":5", "min is not below max"),
    "twice the same": ("[8, 64]", "[8, 8]", ":6", "the same value twice"),
    "no values": ("{values: [8, 64]}", "64", ":6", "{value: 64}"),
    "unknown key of a parameter": ("{values: [8, 64]}", "{value_s: [8, 64]}", ":6", "did you mean values?"),
    "unknown key": ("method:", "metod:", ":2", "did you mean method?"),
    "unknown method": ("random", "bayesian", ":2", "did you mean bayes?"),
    "grid with a range": ("random", "grid", ":5", "a grid has no ranges"),
    "no metric": ("metric: {name: eval/loss, goal: minimize}\n", "", "sweep.yaml", "what is better"),
    "unknown metric": ("name: eval/loss", "name: loss", ":3", "no run logs such a metric"),
    "wrong way round": ("minimize", "maximize", ":3", "goal: minimize"),
    "owned by the trial": ("  packing: {values: [true, false]}", "  output_dir: {values: [a, b]}", ":7", "command"),
    "flag that both give": ("  - ${args}", "  - --lora_r=8\n  - ${args}", "given twice", "lora_r"),
    "typo in the command": ("--config=", "--confg=", ":9", "did you mean config?"),
    "no arguments": ("  - ${args}\n", "", ":9", "add ${args}"),
    "other arguments": ("${args}", "${args_no_hyphens}", ":9", "${args}"),
    "no program": ("program: launch/train.py", "program: train.py", ":1", "launch/train.py"),
    "nothing held out": ("quickstart_sft.yaml", "quickstart_sft.yaml\n  - --eval_files", ":3", "never measured"),
    "the same option twice": ("  packing:", "  lora_r: {values: [1, 2]}\n  packing:", ":7", "once more after line 6"),
    "the same key twice": ("method: random", "method: random\nmethod: grid", ":3", "once more after line 2"),
    "a key that YAML reads as True": ("method: random", "method: random\nyes: 1", "sweep.yaml", "no such key"),
    "an option merged in": ("  lora_r:", "  <<: {lora_rank: {values: [1, 2]}}\n  lora_r:", "sweep.yaml", "lora_r?"),
    "probabilities that are no numbers": ("[8, 64]", "[8, 64], probabilities: [a, b]", ":6", "['a', 'b']"),
    "a single probability": ("[8, 64]", "[8, 64], probabilities: 0.5", ":6", "as many probabilities"),
    "values no distance apart": ("log_uniform_values", "q_uniform, q: 0", ":5", "positive q"),
    "not YAML": ("method: random", "method: [", "sweep.yaml:", "not YAML"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_line(case: str, tmp_path: Path) -> None:
    old, new, where, words = MISTAKES[case]
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, GOOD.replace(old, new))
    assert where in str(caught.value)
    assert words in str(caught.value)


def test_values_that_contradict_each_other_are_found_in_a_grid(tmp_path: Path) -> None:
    text = GOOD.replace("random", "grid").replace(
        "{distribution: log_uniform_values, min: 1.0e-5, max: 1.0e-3}", "{values: [0.0001]}"
    )
    text = text.replace("  train_on: {value: all}", "  max_seq_length: {values: [128, 600]}")
    with pytest.raises(ConfigError) as caught:  # 600 tokens do not fit into the config's micro-batch of 512
        check(tmp_path, text)
    assert "does not fit into a micro-batch" in str(caught.value)
    assert "max_seq_length 600" in str(caught.value)


def test_candidates_cover_every_value(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(GOOD)
    tried = list(combinations(read_sweep(str(tmp_path / "sweep.yaml"))))
    assert {values["lora_r"] for values in tried} == {8, 64}
    assert {values["packing"] for values in tried} == {True, False}
    assert {values["learning_rate"] for values in tried} >= {1e-5, 1e-3}


def test_flags_beside_the_sweep_win(tmp_path: Path) -> None:
    assert extra_flags(["--max_steps", "3", "--device=cpu"]) == {"max_steps": "3", "device": "cpu"}
    check(tmp_path, GOOD, max_steps="3")
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, GOOD, max_steps="many")
    assert caught.value.where == "command line, behind --: --max_steps"
    with pytest.raises(ConfigError, match="did you mean max_steps") as caught:
        check(tmp_path, GOOD, max_step="3")
    assert caught.value.where == "command line"
    for words in (["3"], ["--max_steps", "3", "--max_steps=4"]):
        with pytest.raises(ConfigError):
            extra_flags(words)


@pytest.mark.parametrize("name", ["tracker", "output_dir", "resume", "lora_r", "train_on"])
def test_a_flag_that_trials_would_ignore_or_that_would_belie_their_parameters_is_refused(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"--{name}") as caught:
        check(tmp_path, GOOD, **{name: "8"})
    assert caught.value.where == "command line"
