"""What a machine's variables add to the options: folders below everything given, and names in the output folder."""

from pathlib import Path

import pytest

from anima.config.cli import parse_config
from anima.errors import ConfigError

NEEDED = ["--model_name_or_path", "m", "--train_files", "d.jsonl"]


def test_folders_of_the_machine_lie_below_yaml_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANIMA_DATA_CACHE_DIR", "/scratch/data")
    monkeypatch.setenv("ANIMA_REFERENCE_CACHE_DIR", "/scratch/reference")
    monkeypatch.setenv("ANIMA_BASE_STAGING_DIR", "")
    config, _ = parse_config([*NEEDED, "--output_dir", "o"])
    assert config.data.data_cache_dir == "/scratch/data"
    assert config.preference.reference_cache_dir == "/scratch/reference"  # no matter that sft does not use it
    assert config.model.base_staging_dir is None
    (tmp_path / "c.yaml").write_text("data_cache_dir: /yaml\n")
    config, _ = parse_config([*NEEDED, "--output_dir", "o", "--config", str(tmp_path / "c.yaml")])
    assert config.data.data_cache_dir == "/yaml"
    config, _ = parse_config([*NEEDED, "--output_dir", "o", "--data_cache_dir", "/flag"])
    assert config.data.data_cache_dir == "/flag"


def test_variables_in_the_output_folder_are_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    config, _ = parse_config([*NEEDED, "--output_dir=runs/$WANDB_SWEEP_ID/${WANDB_RUN_ID}"])
    assert config.output.output_dir == "runs/abc/r1"
    monkeypatch.delenv("WANDB_RUN_ID")
    with pytest.raises(ConfigError) as caught:
        parse_config([*NEEDED, "--output_dir=runs/$WANDB_RUN_ID"])
    assert "WANDB_RUN_ID is not set" in str(caught.value)


def test_a_leading_tilde_is_the_home_folder_in_yaml_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell replaces it in `--output_dir ~/x` alone; half of the program doing so would cut a run in two."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/runs/mine\n")
    config, _ = parse_config([*NEEDED, "--config", str(tmp_path / "c.yaml")])
    assert config.output.output_dir == f"{tmp_path}/runs/mine"
