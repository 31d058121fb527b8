"""From a command line to a Config."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from anima.config.cli import ConfigFile, LaunchOptions, parse_command, parse_config, parse_flags
from anima.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
)
from anima.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRED = ["--model_name_or_path", "m", "--train_files", "a.jsonl", "--output_dir", "out"]


def parse(*argv: str) -> Config:
    return parse_config([*REQUIRED, *argv])[0]


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(argv)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_required_flags_alone_give_the_defaults_of_the_schema() -> None:
    config, launch = parse_config(REQUIRED)
    assert config == Config(
        model=ModelConfig(model_name_or_path="m"),
        data=DataConfig(train_files=("a.jsonl",)),
        output=OutputConfig(output_dir="out"),
    )
    assert launch == LaunchOptions(config=None, dry_run=False)


def test_values_have_their_types_in_both_spellings() -> None:
    spaced = parse("--learning_rate", "2e-5", "--max_steps", "7", "--packing", "False", "--lora_alpha", "32")
    attached = parse("--learning_rate=2e-05", "--max_steps=7", "--packing=false", "--lora_alpha=32")
    assert spaced == attached
    assert spaced.optimization.learning_rate == 0.00002
    assert spaced.optimization.max_steps == 7
    assert spaced.batch.packing is False
    assert isinstance(spaced.lora.lora_alpha, float)


def test_what_wandb_agents_write() -> None:
    config = parse(
        "--learning_rate=1e-05",
        "--max_steps=None",
        "--packing=True",
        "--lora_dropout=0.05",
        "--lora_target_modules=['q_proj', 'v_proj']",
        "--run_name=None",
    )
    assert config.optimization.learning_rate == 0.00001
    assert config.optimization.max_steps is None
    assert config.output.run_name is None
    assert config.batch.packing is True
    assert config.lora.lora_target_modules == ("q_proj", "v_proj")


def test_a_list_takes_several_values_and_dashes_are_values() -> None:
    config = parse_config(
        ["--train_files", "a", "b", "--model_name_or_path=m", "--output_dir=o", "--sample_prompts", "x", "-y", "-1"]
    )[0]
    assert config.data.train_files == ("a", "b")
    assert config.output.sample_prompts == ("x", "-y", "-1")


def test_dry_run_stands_alone_or_has_a_value() -> None:
    assert parse_config([*REQUIRED, "--dry_run"])[1].dry_run
    assert parse_config(["--dry_run", *REQUIRED])[1].dry_run
    assert parse_config([*REQUIRED, "--dry_run", "True"])[1].dry_run
    assert not parse_config([*REQUIRED, "--dry_run=False"])[1].dry_run


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--learning-rate=1"], ["did you mean learning_rate", "--learning_rate"]),
        (["--per_device_train_batch_size=1"], ["did you mean global_batch_size"]),
        (["--learning_rate", "fast"], ["--learning_rate", "'fast'", "a number"]),
        (["--learning_rate=nan"], ["'nan'", "a number"]),
        (["--lora_r", "1.5"], ["lora_r", "'1.5'", "a whole number"]),
        (["--max_steps=1e4"], ["did you mean 10000", "--max_steps 10000"]),
        (["--quantization=nf5"], ["did you mean nf4", "nf4 or none"]),
        (["--packing", "1"], ["'1'", "True or False"]),
        (["--dry_run", "maybe"], ["dry_run", "'maybe'", "True or False"]),
        (["--wandb_project", "None"], ["wandb_project", "'None'"]),
        (["--seed", "1", "--seed", "2"], ["--seed is given twice"]),
        (["--warmup_ratio=2"], ["a share is 0 to 1", "--warmup_ratio"]),
        (["--max_seq_length=9000"], ["does not fit into a micro-batch", "--micro_batch_tokens"]),
        (["--micro_batch_tokens=0"], ["--recompute auto chooses", "a number of tokens, or 0 with --recompute auto"]),
        (["--micro_batch_tokens=-1", "--recompute=auto"], ["an empty pass"]),
        (["--max_seq_length=9000", "--recompute=auto"], ["does not fit into a micro-batch"]),
        (["--recompute=autumn"], ["unknown policy", "auto, all, cheap, none"]),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], words: list[str]) -> None:
    shown = message(*REQUIRED, *argv)
    for word in words:
        assert word in shown


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_tokens_that_are_chosen_later_are_held_against_nothing(objective: str) -> None:
    chosen = ("--recompute=auto", "--micro_batch_tokens=0", "--max_seq_length=9000", f"--objective={objective}")
    config = parse(*chosen)
    assert config.batch.tokens_unmeasured(300) == 8192
    assert config.batch.tokens_unmeasured(9000) == 9000
    assert parse("--micro_batch_tokens=2048").batch.tokens_unmeasured(3000) == 2048


def test_everything_that_is_missing_is_named_at_once() -> None:
    shown = message("--output_dir=o")
    assert "model_name_or_path, train_files" in shown
    assert "--model_name_or_path VALUE --train_files VALUE" in shown
    assert "--config" in shown


def test_nothing_but_the_error_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    message(*REQUIRED, "--max_steps=x")
    message(*REQUIRED, "--tracker=x")
    assert capfd.readouterr() == ("", "")


def test_help_lists_every_flag_with_its_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_config(["--no_such_flag", "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    for name in [*parse().flat(), "config", "dry_run"]:
        assert f"--{name}" in shown
    for group in ("model options", "lora options", "data options", "batch options", "optimization options"):
        assert group in shown
    assert "Peak learning rate." in shown
    assert "(required)" in shown


def test_parse_flags_reads_a_small_schema_of_its_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class ChatFlags:
        adapter_path: str
        max_new_tokens: int = 8

    assert parse_flags(ChatFlags, ["--adapter_path=a"], prog="launch/chat.py") == ChatFlags(adapter_path="a")
    with pytest.raises(ConfigError, match=r"launch/chat\.py --adapter_path VALUE"):
        parse_flags(ChatFlags, [], prog="launch/chat.py")


def test_no_heavy_library_is_needed() -> None:
    code = (
        "import sys, anima.config.cli, anima.config.deepspeed_json\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@dataclass(frozen=True, kw_only=True)
class Own(ConfigFile):
    """A program's own flags."""

    times: int = 1
    """How often."""


@dataclass(frozen=True, kw_only=True)
class OwnAndTraining(Own, Config):
    """Both."""


def test_a_program_may_take_the_flags_of_training_and_its_own(tmp_path: Path) -> None:
    def read(*argv: str) -> tuple[Config, Own]:
        return parse_command(OwnAndTraining, Own, argv, prog="p", spare={"output_dir": "nowhere", "seed": "7"})

    config, own = read("--model_name_or_path", "m", "--times", "3", "--train_files", "a", "b", "--seed=5")
    assert (config.data.train_files, config.seed, config.output.output_dir, own.times) == (("a", "b"), 5, "nowhere", 3)
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\ntrain_files: a\noutput_dir: out\n")
    config, own = read("--config", str(tmp_path / "run.yaml"))
    assert (config.output.output_dir, config.seed, own.times) == ("out", 7, 1)
    with pytest.raises(ConfigError, match="did you mean times"):
        read("--timse", "3")
    (tmp_path / "run.yaml").write_text("times: 3\n")
    with pytest.raises(ConfigError, match="no option 'times'"):
        read("--config", str(tmp_path / "run.yaml"))
