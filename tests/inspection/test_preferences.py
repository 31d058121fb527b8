"""Preference rows in all usual shapes, judged on their raw texts."""

from pathlib import Path
from typing import Any

import pytest

from anima.data.sources import resolve
from anima.inspection.findings import Findings
from anima.inspection.preferences import PreferenceCheck, RawPair, is_preference, plain_texts, raw_pair

TURN = {"role": "user", "content": "Q"}


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, RawPair(("Q", "Q"), "A", "B")),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: R\n\nAssistant: B"},
            RawPair(("\n\nHuman: Q", "\n\nHuman: R"), " A", " B"),
        ),
        (
            {"chosen": [TURN, {"role": "assistant", "content": "A"}], "rejected": [TURN, {"content": "B"}]},
            RawPair(("Q", "Q"), "A", "B"),
        ),
        (
            {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"value": "A"}, "rejected": {"value": "B"}},
            RawPair(("Q", "Q"), "A", "B"),
        ),
        ({"prompt": "Q", "chosen": None, "rejected": 3}, RawPair(("Q", "Q"), "", "")),
    ],
)
def test_shapes(row: dict[str, Any], pair: RawPair) -> None:
    assert is_preference(row)
    assert raw_pair(row) == pair


def test_names_of_speakers_are_no_artefacts() -> None:
    row = {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"}
    assert not any("Human:" in text or "Assistant:" in text for text in plain_texts(row))


def test_what_is_found() -> None:
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "A "},
        {"prompt": "Q", "chosen": "", "rejected": "B"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: R\n\nAssistant: B"},
        {"prompt": "Z", "chosen": "long answer", "rejected": "B"},
        {"prompt": "Z", "chosen": "B", "rejected": "long answer"},
    ]
    findings = Findings()
    check = PreferenceCheck(findings)
    for number, row in enumerate(rows, start=1):
        check.add(row, f"f:{number}")
    assert {name: found.places for name, found in findings.found.items()} == {
        "chosen equal to rejected": ["f:1"],
        "an empty answer": ["f:2"],
        "prompt mismatch": ["f:3"],
        "an earlier prompt with the answers swapped": ["f:5 = f:4"],
    }
    (note,) = check.notes()
    # Longer: row 4 only; equal: row 3 (" A", " B"). Preferring the shorter one is right in 3 of 5, plus half of one.
    assert "chosen is longer in 20%, equally long in 20%" in note
    assert "is right in 70%" in note
    assert "instead of quality" not in note


def test_length_bias_of_real_pairs(shared_data_dir: Path) -> None:
    """Shares given by the data's own description: 86 % of the gold pairs, 89 % of the others."""
    for name, share in (("anima_dpo_pairs_belle_gold.jsonl", "86%"), ("anima_dpo_pairs_pre_post.jsonl", "89%")):
        check = PreferenceCheck(Findings())
        for row in resolve([str(shared_data_dir / name)], "train_files")[0].rows():
            check.add(row.values, row.place)
        (note,) = check.notes()
        assert f"chosen is longer in {share}" in note
        assert "instead of quality" in note
