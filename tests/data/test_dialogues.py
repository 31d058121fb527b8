"""Dialogues in one text: their turns, and what the ancestor did with them."""

import json
from pathlib import Path

import pytest

from anima.data.dialogues import CHIP2, HH_RLHF, OASST1, Dialect, dialect_of, split_dialogue
from anima.data.formats import detect_format, to_conversation
from anima.data.records import Message
from anima.errors import DataError


@pytest.mark.parametrize(
    ("dialect", "text", "turns"),
    [
        (CHIP2, "<human>: A\n<bot>: B\nb\n<human>: C\n<bot>: D", ["user A", "assistant B\nb", "user C", "assistant D"]),
        (CHIP2, "<human>: say <bot>: twice\n<bot>: ok", ["user say <bot>: twice", "assistant ok"]),
        (HH_RLHF, "\n\nHuman: hi\n\nAssistant: a: b\n\nc", ["user hi", "assistant a: b\n\nc"]),
        (HH_RLHF, "Be kind.\n\nHuman: hi\n\nAssistant:", ["system Be kind.", "user hi", "assistant "]),
        (OASST1, "### Human: a### Assistant: b\n### Human: c", ["user a", "assistant b", "user c"]),
        (OASST1, "### Human: # Head### Assistant:\n## 2", ["user # Head", "assistant \n## 2"]),
    ],
)
def test_turns(dialect: Dialect, text: str, turns: list[str]) -> None:
    assert [f"{role} {said}" for role, said in split_dialogue(text, dialect, "text", "f:1")] == turns


def test_a_text_without_speakers_is_no_dialogue() -> None:
    with pytest.raises(DataError, match="text is no dialogue of the kind chip2") as caught:
        split_dialogue("Once upon a time", CHIP2, "text", "f:9")
    assert caught.value.where == "f:9"


def test_the_kind_of_a_text_is_seen_in_it() -> None:
    for text, name in (("<human>: a\n<bot>: b", "chip2"), ("### Human: a### Assistant: b", "oasst1"), ("Once", "text")):
        assert dialect_of(text) == detect_format({"text": text}, "f:1") == name


def test_golden_rows_of_the_ancestor_with_its_defects_mended(shared_data_dir: Path) -> None:
    """Kept: every single exchange. Mended: B9 (null became the word None), turns lost or learned as one text."""
    cases = json.loads((shared_data_dir / "golden_cases.json").read_text("utf-8"))["format_cases"]
    mended = {
        # all turns are kept, and none of the user's is learned
        "multi-turn": ["user A", "assistant B", "user C", "assistant D"],
        "SFT use": ["user hi", "assistant hello"],
        "loss on every turn": ["user a", "assistant b"],
    }
    seen = []
    for case in cases:
        name = {"hh-rlhf": "hh_rlhf_chosen"}.get(case["format"], case["format"].replace("-", "_"))
        turns = to_conversation(case["row"], name, "golden").messages
        told = [f"{m.role} {m.content}" for m in turns]
        note = next((note for note in mended if case["note"].startswith(note)), None)
        if note is not None:
            assert told == mended[note]
        elif name == "alpaca":
            assert turns[-1] == Message("assistant", case["target"])
            assert "None" not in turns[0].text
        else:
            assert told == [f"user {case['source']}", f"assistant {case['target']}"]
        seen.append(note)
    assert (len(seen), sum(note is None for note in seen)) == (11, 8)


@pytest.mark.parametrize("chosen", ["\n\nHuman: hi\n\nAssistant: hello"])
def test_chosen_answers_are_learned_only_when_asked(chosen: str) -> None:
    row = {"chosen": chosen, "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    with pytest.raises(DataError, match="fits no known format") as caught:
        detect_format(row, "f:1")
    assert "--dataset_format hh_rlhf_chosen" in str(caught.value.fix)
    with pytest.raises(DataError) as other:
        detect_format({"prompt": "p", "chosen": "a", "rejected": "b"}, "f:1")
    assert str(other.value.fix) == "these are preferences: --objective dpo"
    assert to_conversation(row, "hh_rlhf_chosen", "f:1").messages == (
        Message("user", "hi"),
        Message("assistant", "hello"),
    )


def test_lists_of_questions_and_answers() -> None:
    row = {"input": ["A", "C"], "output": ["B", "D"]}
    assert detect_format(row, "f:1") == "input_output"
    assert [m.text for m in to_conversation(row, "input_output", "f:1").messages] == ["A", "B", "C", "D"]
    with pytest.raises(DataError, match="different lengths"):
        to_conversation({"input": ["A"], "output": []}, "input_output", "f:1")
    with pytest.raises(DataError, match=r"output\[0\] is not text"):
        to_conversation({"input": ["A"], "output": [None]}, "input_output", "f:1")
