"""Secrets are found by value, and ordinary options are not mistaken for them."""

import pytest

from anima.config.schema import Config, DataConfig, ModelConfig, OutputConfig
from anima.tracking.secrets import find_secret

KEY = "canary-0123456789abcdef"


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET", "DB_PASSWORD", "TOKEN"])
@pytest.mark.parametrize("value", [KEY, f"prefix {KEY} suffix", ("a", KEY), {"inner": [KEY]}, {KEY: 1}])
def test_value_of_a_secret_variable_is_found_wherever_it_hides(variable: str, value: object) -> None:
    found = find_secret({"seed": 1, "run_name": value}, {variable: KEY})
    assert found is not None
    assert found[0] == "run_name"
    assert variable in found[1]
    assert KEY not in "".join(found)


@pytest.mark.parametrize(
    "value", ["hf_" + "a1B2" * 9, "https://hf_x/?k=sk-" + "a" * 24, "https://user:s3cret@example.org/model"]
)
def test_shapes_of_secrets_are_found_without_a_variable(value: str) -> None:
    assert find_secret({"model_name_or_path": value}, {}) is not None


def test_ordinary_config_holds_no_secret() -> None:
    config = Config(
        model=ModelConfig(model_name_or_path="hub/models--x/snapshots/" + "0123456789abcdef" * 2 + "01234567"),
        data=DataConfig(train_files=("https://example.org:8080/a.json", "hf_dataset/b.json")),
        output=OutputConfig(output_dir="out/task-sk-learn"),
    )
    environment = {"SOME_TOKEN": "nf4", "KEYBOARD": "us-intl-layout", "PATH": "out/task-sk-learn", "API_KEY": ""}
    assert find_secret(config.flat(), environment) is None
