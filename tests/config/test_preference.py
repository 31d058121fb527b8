"""Options of preference training: what has no effect or contradicts the objective is refused, by name."""

from typing import Any

import pytest

from anima.config.cli import parse_config
from anima.config.preference import PreferenceConfig
from anima.errors import ConfigError

BASE = ["--model_name_or_path", "m", "--train_files", "f.jsonl", "--output_dir", "o"]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"label_smoothing": 0.5}, "--label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "--label_smoothing"),
        ({"loss_type": "robust"}, "--label_smoothing"),
        ({"sft_weight": -1.0}, "--sft_weight"),
        ({"sft_weight": 0.1, "loss_type": "orpo"}, "--sft_weight"),
        ({"length_normalize": True, "loss_type": "simpo"}, "--length_normalize"),
        ({"simpo_gamma": 0.3}, "--simpo_gamma"),
        ({"simpo_gamma": -0.3, "loss_type": "simpo"}, "--simpo_gamma"),
        ({"reference": "sft"}, "--reference"),
        ({"reference": "adapter:"}, "--reference"),
        ({"reference": "base", "loss_type": "orpo"}, "--reference"),
    ],
)
def test_options_without_effect_or_sense_are_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PreferenceConfig(**options)
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("argv", "where", "what"),
    [
        (["--beta", "0.2"], "--beta", "no effect on --objective sft"),
        (["--reference", "base"], "--reference", "no effect on --objective sft"),
        (["--dataset_format", "hh_rlhf"], "--dataset_format", "not what --objective sft trains on"),
        (["--objective", "dpo", "--dataset_format", "alpaca"], "--dataset_format", "not what --objective dpo"),
        (["--objective", "dpo", "--train_on", "all"], "--train_on", "only the answers carry loss"),
        (
            ["--objective", "dpo", "--micro_batch_tokens", "1200", "--max_seq_length", "601"],
            "--micro_batch_tokens",
            "pair of 1202 tokens does not fit",
        ),
        (["--objective", "dpo", "--loss_type", "sigmiod"], "--loss_type", "did you mean sigmoid"),
    ],
)
def test_options_that_do_not_go_with_the_objective_are_refused(argv: list[str], where: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        parse_config([*BASE, *argv])
    assert caught.value.where == where


def test_what_is_compared_with_what() -> None:
    assert PreferenceConfig().needs_reference
    assert PreferenceConfig(reference="adapter:runs/a").reference_adapter == "runs/a"
    assert PreferenceConfig().reference_adapter is None
    assert not PreferenceConfig(reference="none").needs_reference
    assert not PreferenceConfig(loss_type="simpo").needs_reference


def test_the_resolved_config_of_either_objective_is_accepted_again() -> None:
    from anima.config.cli import to_yaml

    for argv in ([], ["--objective", "dpo", "--loss_type", "simpo", "--simpo_gamma", "1.5"]):
        config, _ = parse_config([*BASE, *argv])
        assert "preference:" in to_yaml(config)
        assert config.flat()["beta"] == 0.1
