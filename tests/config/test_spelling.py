"""Suggestions for mistyped names."""

import pytest

from anima.config.flags import flag_table
from anima.config.schema import Config
from anima.config.spelling import ELSEWHERE, nearest

KNOWN = ["learning_rate", "lr_scheduler_type", "save_steps", "eval_steps", "global_batch_size", "seed"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learnig_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("--Learning_Rate", "learning_rate"),
        ("global", "global_batch_size"),
        ("per_device_train_batch_size", "global_batch_size"),
        ("zzz", None),
        ("", None),
    ],
)
def test_nearest(written: str, meant: str | None) -> None:
    assert nearest(written, KNOWN) == meant


def test_a_name_from_elsewhere_is_suggested_only_where_it_exists() -> None:
    assert nearest("lr", ["learning_rate"]) == "learning_rate"
    assert nearest("lr", ["stage", "overlap_comm"]) is None


def test_names_from_elsewhere_lead_to_options_that_exist() -> None:
    flags = flag_table(Config)
    assert set(ELSEWHERE.values()) <= set(flags)
    assert not set(ELSEWHERE) & set(flags), "a real option needs no translation"
