"""What may differ between a saved run and the one that goes on: every option has exactly one answer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import Config, DataConfig, ModelConfig, OutputConfig
from anima.errors import CheckpointError
from anima.train import resume
from anima.train.resume import FIXED, FREE, JUDGED, NOTICED, check_config, check_identity
from anima.train.run import Identity, Origin

CONFIG = Config(
    model=ModelConfig(model_name_or_path="m"),
    data=DataConfig(train_files=("a.jsonl",)),
    output=OutputConfig(output_dir="run"),
)
IDENTITY = Identity(CONFIG.flat(), "base-1", "data-1", "<user>", {"torch": "2.11"}, "cpu AVX2, 1 threads", 2)


def origin(**changes: Any) -> Origin:
    """A checkpoint of a run whose options differ from CONFIG in `changes`; saved as JSON, so tuples are lists."""
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in CONFIG.flat().items()}
    return Origin(Path("runs/a/step-4"), 4, {"identity": {**vars(IDENTITY), "config": {**config, **changes}}}, True)


def test_the_tables_name_options_that_exist_and_none_twice() -> None:
    tables = [FREE, NOTICED, JUDGED, FIXED]
    assert sum(map(len, tables)) == len(frozenset().union(*tables))
    assert frozenset().union(*tables) <= CONFIG.flat().keys()


def test_an_equal_config_passes_in_silence() -> None:
    assert check_config(origin(), CONFIG.flat(), ()) == []


@pytest.mark.parametrize(("name", "old"), [("logging_steps", 7), ("tracker", "wandb"), ("train_files", ["b.jsonl"])])
def test_harmless_and_otherwise_judged_options_pass_in_silence(name: str, old: object) -> None:
    assert check_config(origin(**{name: old}), CONFIG.flat(), ()) == []


def test_the_new_value_of_a_training_option_wins_and_is_said() -> None:
    assert check_config(origin(learning_rate=0.5), CONFIG.flat(), ()) == ["--learning_rate is now 0.0001; it was 0.5"]


def test_paged_and_plain_8_bit_states_are_the_same_and_fp32_ones_are_not() -> None:
    assert check_config(origin(optimizer="adamw_8bit"), CONFIG.flat(), ()) == []
    with pytest.raises(CheckpointError, match="--optimizer differs"):
        check_config(origin(optimizer="adamw_torch"), CONFIG.flat(), ("optimizer",))


@pytest.mark.parametrize("name", ["seed", "global_batch_size", "lora_dropout", "quantization", "an_option_of_tomorrow"])
def test_all_others_are_refused_until_they_are_named(name: str) -> None:
    saved = origin(**{name: "old"})
    with pytest.raises(CheckpointError, match=f"--{name} differs") as caught:
        check_config(saved, CONFIG.flat(), ())
    assert f"--allow_changed {name}" in str(caught.value)
    assert "allowed: old" in str(caught.value)
    assert len(check_config(saved, CONFIG.flat(), (name,))) == 1


@pytest.mark.parametrize("name", ["base_fingerprint", "data_fingerprint", "rendering"])
def test_base_data_and_template_are_compared_by_content(name: str) -> None:
    other = replace(IDENTITY, **{name: "other"})
    with pytest.raises(CheckpointError, match=resume.FINGERPRINTS[name]) as caught:
        check_identity(origin(), other, ())
    assert f"--allow_changed {name}" in str(caught.value)
    assert len(check_identity(origin(), other, (name,))) == 1
    assert check_identity(origin(), replace(IDENTITY, **{name: ""}), ()) == []


def test_versions_and_ranks_are_told() -> None:
    notices = check_identity(origin(), replace(IDENTITY, versions={"torch": "2.13"}, world_size=4), ())
    assert "torch is 2.13; the checkpoint was written with 2.11" in notices
    assert any(notice.startswith("4 rank(s) instead of 2") for notice in notices)
