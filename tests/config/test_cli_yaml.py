"""From a YAML file to a Config, and back."""

import errno
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from anima.config.cli import describe, parse_config, to_yaml, write_config
from anima.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizationConfig,
    OutputConfig,
)
from anima.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRED = ["--model_name_or_path", "m", "--train_files", "a.jsonl", "--output_dir", "out"]


def parse(*argv: str) -> Config:
    return parse_config([*REQUIRED, *argv])[0]


def from_yaml(folder: Path, text: str, *argv: str) -> Config:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return parse_config(["--config", str(path), *argv])[0]


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_default_yields_to_yaml_and_yaml_to_the_command_line(tmp_path: Path) -> None:
    text = "model_name_or_path: m\ntrain_files: [a, b]\noutput_dir: o\nlearning_rate: 2e-5\nseed: 7\n"
    config = from_yaml(tmp_path, text, "--seed=8", "--train_files", "c")
    assert config.lora.lora_r == 64
    assert config.optimization.learning_rate == 0.00002
    assert config.seed == 8
    assert config.data.train_files == ("c",)


def test_yaml_and_flags_are_typed_by_one_parser(tmp_path: Path) -> None:
    # PyYAML alone reads 2e-5 as text, 010 as 8, 1:30 as 90, yes as True and 2024-01-01 as a date.
    text = (
        "model_name_or_path: 010\ntrain_files: 2024-01-01\noutput_dir: 1:30\nrun_name: yes\nlearning_rate: 2e-5\n"
        "packing: FALSE\nmax_steps: ~\nresume: 'a: b'\nsample_prompts:\n- 1.0\n- null hypothesis\n- 你好：#1\n"
    )
    config = from_yaml(tmp_path, text)
    assert config.model.model_name_or_path == "010"
    assert config.data.train_files == ("2024-01-01",)
    assert config.output.output_dir == "1:30"
    assert config.output.run_name == "yes"
    assert config.optimization.learning_rate == 0.00002
    assert config.batch.packing is False
    assert config.optimization.max_steps is None
    assert config.resume == "a: b"
    assert config.output.sample_prompts == ("1.0", "null hypothesis", "你好：#1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nlearning_rat: 1e-4\n", ["run.yaml:2", "did you mean learning_rate"]),
        ("learning-rate: 1e-4\n", ["run.yaml:1", "did you mean learning_rate"]),
        ("seed: 1\n\nseed: 2\n", ["'seed' stands twice", "run.yaml:3", "run.yaml:1"]),
        ("model:\n  seed: 1\n", ["keys are flat", "run.yaml:1", "'model'"]),
        ("seed:\n  value: 1\n", ["keys are flat", "run.yaml:1"]),
        ("# c\nlearning_rate: fast\n", ["run.yaml:2 (learning_rate)", "'fast'", "a number"]),
        ("packing: yes\n", ["run.yaml:1 (packing)", "'yes'", "True or False"]),
        ("tracker: wandd\n", ["run.yaml:1 (tracker)", "did you mean wandb", "tracker: wandb"]),
        ("seed: [1, 2]\n", ["run.yaml:1 (seed)", "a list", "a whole number"]),
        ("output_dir: null\n", ["run.yaml:1 (output_dir)", "'None'"]),
        ("eval_files: null\n", ["run.yaml:1 (eval_files)", "null"]),
        ("sample_prompts: [a, null]\n", ["run.yaml:1 (sample_prompts)", "null"]),
        ("sample_prompts: [[a]]\n", ["run.yaml:1 (sample_prompts)", "a list"]),
        ("seed: !!python/object/apply:os.getpid []\n", ["run.yaml:1 (seed)"]),
        ("max_grad_norm: -1\n", ["run.yaml:1 (max_grad_norm)", "a norm cannot be negative"]),
        ("dry_run: true\n", ["run.yaml:1", "--dry_run on the command line"]),
        ("- seed\n", ["a config is a mapping", "run.yaml:1"]),
        ("", ["the config is empty", "run.yaml"]),
        ("# only a comment\n", ["the config is empty"]),
        ("seed: [1\n", ["this is not YAML", "run.yaml:2:1"]),
        ("seed: 1\n\tlora_r: 2\n", ["this is not YAML", "run.yaml:2:1"]),
        ("seed: 1\n---\nseed: 2\n", ["this is not YAML", "run.yaml:2:1"]),
        ("run_name: \x00\n", ["this is not YAML", "run.yaml"]),
    ],
)
def test_mistakes_in_yaml_name_the_line(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    given_later = [] if "output_dir" in text else ["--output_dir=o"]
    shown = message("--config", str(path), "--model_name_or_path=m", "--train_files=a", *given_later)
    for word in words:
        assert word in shown


def test_a_config_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "there.yaml").write_text("seed: 1\n")
    (tmp_path / "latin.yaml").write_bytes(b"run_name: caf\xe9\n")
    shown = message(*REQUIRED, "--config", str(tmp_path / "their.yaml"))
    assert "No such file" in shown
    assert "there.yaml" in shown
    assert "cannot be read" in message(*REQUIRED, "--config", str(tmp_path))
    assert "UTF-8" in message(*REQUIRED, "--config", str(tmp_path / "latin.yaml"))
    assert "--config is given twice" in message(*REQUIRED, "--config=a", "--config=b")


# "None" as the text of an option that may be None is that None, as W&B writes it: it cannot be a name.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: text != "None")
AWKWARD = ["123", "1e-4", "null", "~", "true", "a: b #c", "--x", "- y", "中文：好", "a\x85b", "a\n\n b "]
PROMPT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    output_dir=TEXT,
    run_name=st.none()
    | TEXT
    | st.sampled_from(["123", "1e-4", "null", "~", "true", "a: b #c", "--x", "- y", "中文：好", "a\x85b", "a\n\n b "]),
    prompts=st.lists(PROMPT | st.just("None"), max_size=3),
    learning_rate=st.floats(min_value=0, exclude_min=True, max_value=1),
    max_steps=st.none() | st.integers(min_value=1),
    packing=st.booleans(),
)
def test_the_written_yaml_gives_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory,
    output_dir: str,
    run_name: str | None,
    prompts: list[str],
    learning_rate: float,
    max_steps: int | None,
    packing: bool,
) -> None:
    config = Config(
        model=ModelConfig(model_name_or_path="m"),
        lora=LoraConfig(lora_target_modules=("q_proj", "v_proj")),
        data=DataConfig(train_files=("a", "-b"), source_max_len=3, target_max_len=4),
        batch=BatchConfig(packing=packing),
        optimization=OptimizationConfig(learning_rate=learning_rate, max_steps=max_steps),
        output=OutputConfig(output_dir=output_dir, run_name=run_name, sample_prompts=tuple(prompts)),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    write_config(config, path)
    assert parse_config(["--config", str(path)])[0] == config


def test_the_written_yaml_is_flat_whole_and_says_how_to_run_it_again() -> None:
    config = parse_config(["--model_name_or_path=m", "--train_files=a", "--output_dir=runs/my run/"])[0]
    text = to_yaml(config)
    assert text.splitlines()[0] == (
        "# deepspeed launch/train.py --config 'runs/my run/config.yaml' --output_dir 'runs/my run-again'"
    )
    loaded = yaml.safe_load(text)
    assert list(loaded) == list(config.flat())
    assert loaded["adam_epsilon"] == 1e-8, "other readers of the file get a number, too"
    assert "# optimization: Optimizer and schedule." in text


def test_what_a_dry_run_prints_can_be_run(tmp_path: Path) -> None:
    config = parse("--seed=9")
    shown = describe(config, {"zero_optimization": {"stage": 2}})
    assert '#     "stage": 2' in shown
    assert from_yaml(tmp_path, shown) == config


def test_writing_replaces_the_whole_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "new" / "config.yaml"
    write_config(parse("--seed=1"), target)
    reader_of_the_old_file = target.open(encoding="utf-8")
    write_config(parse("--seed=2"), target)
    with reader_of_the_old_file:
        assert reader_of_the_old_file.read() == to_yaml(parse("--seed=1"))
    assert target.read_text(encoding="utf-8") == to_yaml(parse("--seed=2"))
    assert [item.name for item in target.parent.iterdir()] == ["config.yaml"]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "config.yaml"
    write_config(parse("--seed=1"), target)
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_config(parse("--seed=2"), target)
    assert target.read_text(encoding="utf-8") == to_yaml(parse("--seed=1"))
    assert [item.name for item in tmp_path.iterdir()] == ["config.yaml"]
