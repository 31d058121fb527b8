"""Every YAML that lies in launch/configs can be run by the command in its first line."""

import shlex
from pathlib import Path

import pytest
import yaml

from anima.config.cli import parse_config
from anima.config.deepspeed_json import merge_deepspeed
from anima.config.flags import flag_table
from anima.config.schema import Config

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = sorted((REPOSITORY / "launch" / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert "anima_33b_sft.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_runs_by_its_first_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# "), "the first line is the command, as a comment"
    command = shlex.split(first.removeprefix("# "))
    script = next(word for word in command if word.startswith("launch/") and word.endswith(".py"))
    config, launch = parse_config(command[command.index(script) + 1 :])
    assert launch.config == str(path.relative_to(REPOSITORY))
    assert merge_deepspeed(config, bf16=True)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_keys_are_options_under_their_own_names(path: Path) -> None:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(keys) <= set(flag_table(Config))


def test_the_ancestors_recipe_is_kept() -> None:
    config, _ = parse_config(["--config", str(REPOSITORY / "launch" / "configs" / "anima_33b_sft.yaml")])
    assert config.model.model_name_or_path == "timdettmers/guanaco-33b-merged"
    assert config.data.train_files == ("Chinese-Vicuna/guanaco_belle_merge_v1.0",)
    assert (config.data.source_max_len, config.data.target_max_len, config.data.sequence_limit) == (512, 512, 1024)
    assert (config.batch.global_batch_size, config.optimization.max_steps) == (16, 10_000)
    assert (config.optimization.learning_rate, config.optimization.max_grad_norm) == (0.0001, 0.3)
    assert (config.optimization.lr_scheduler_type, config.optimization.warmup_ratio) == ("constant", 0.03)
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (64, 16, 0)
    assert len(config.output.sample_prompts) == 3
    assert (config.batch.micro_batch_tokens, config.optimization.recompute) == (0, "auto")


def test_the_ancestors_preference_recipe_is_kept() -> None:
    config, _ = parse_config(["--config", str(REPOSITORY / "launch" / "configs" / "anima_33b_dpo.yaml")])
    assert (config.objective, config.preference.loss_type, config.preference.beta) == ("dpo", "sigmoid", 0.1)
    assert config.preference.needs_reference
    assert (config.batch.global_batch_size, config.optimization.max_steps) == (16, 100)
    assert (config.lora.lora_r, config.lora.lora_alpha, config.lora.lora_dropout) == (256, 16, 0)
    assert (config.data.sequence_limit, config.data.truncation) == (600, "trim_prompt")
    assert config.optimization.learning_rate == 0.0001
    assert (config.output.eval_steps, config.output.save_steps, len(config.output.sample_prompts)) == (10, 10, 3)
