"""Every layout of a preference pair, by hand; every wrong row is one clear error or one counted reason."""

from typing import Any

import pytest

from anima.data.pair_formats import BROKEN, PARTED, Unusable, detect_pair_format, to_pair
from anima.data.records import Message, PreferencePair
from anima.data.text_templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from anima.errors import DataError

ASKED = f"{ALPACA_WITHOUT_INPUT}\n\n### Instruction:\nQ?\n\n### Response: "
ASKED_WITH_INPUT = f"{ALPACA_WITH_INPUT}\n\n### Instruction:\nQ?\n\n### Input:\nI\n\n### Response: "


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def said(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


@pytest.mark.parametrize(
    ("row", "layout", "prompt"),
    [
        ({"prompt": "Q", "chosen": "A", "rejected": "B", "id": 1}, "preference", [Message("user", "Q")]),
        (
            {"prompt": [turn("system", "S"), turn("user", "Q")], "chosen": "A", "rejected": [turn("assistant", "B")]},
            "preference",
            [Message("system", "S"), Message("user", "Q")],
        ),
        (
            {"prompt": [turn("user", "Q")], "chosen": turn("assistant", "A"), "rejected": "B"},
            "preference",
            [Message("user", "Q")],
        ),
        (
            {"conversations": [said("human", "Q")], "chosen": said("gpt", "A"), "rejected": "B", "system": "S"},
            "sharegpt_preference",
            [Message("system", "S"), Message("user", "Q")],
        ),
        (
            {
                "chosen": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q\n\nAssistant: A",
                "rejected": "\n\nHuman: Q1\n\nAssistant: A1\n\nHuman: Q\n\nAssistant: B",
            },
            "hh_rlhf",
            [Message("user", "Q1"), Message("assistant", "A1"), Message("user", "Q")],
        ),
        (
            {
                "chosen": [turn("user", "Q"), turn("assistant", "A")],
                "rejected": [turn("user", "Q"), turn("assistant", "B")],
            },
            "hh_rlhf",
            [Message("user", "Q")],
        ),
        ({"prompt": ASKED, "chosen": "A", "rejected": "B"}, "alpaca_preference", [Message("user", "Q?")]),
        (
            {"prompt": ASKED_WITH_INPUT, "chosen": "A", "rejected": "B"},
            "alpaca_preference",
            [Message("user", "Q?", "I")],
        ),
        ({"chosen": ASKED + "A", "rejected": ASKED + "B"}, "alpaca_preference", [Message("user", "Q?")]),
    ],
)
def test_each_layout_gives_the_same_pair(row: dict[str, Any], layout: str, prompt: list[Message]) -> None:
    assert detect_pair_format(row, "f:1") == layout
    assert to_pair(row, layout, "f:1") == PreferencePair(tuple(prompt), "A", "B", "f:1")


def test_a_rendered_alpaca_prompt_renders_back_to_itself(byte_tokenizer: Any) -> None:
    from anima.data.templates import make_template

    template = make_template("alpaca", byte_tokenizer(chat_template=None))
    for text in (ASKED, ASKED_WITH_INPUT):
        pair = to_pair({"prompt": text, "chosen": "A", "rejected": "B"}, "alpaca_preference", "f:1")
        assert isinstance(pair, PreferencePair)
        assert template.prompt(pair.prompt) == text


def test_the_two_conversations_share_the_prompt() -> None:
    pair = PreferencePair((Message("user", "Q"),), "A", "B", "f:1")
    chosen, rejected = pair.conversations()
    assert chosen.messages == (Message("user", "Q"), Message("assistant", "A"))
    assert rejected.messages == (Message("user", "Q"), Message("assistant", "B"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: other\n\nAssistant: B", PARTED),
        (
            "\n\nHuman: Q\n\nAssistant: A1\n\nHuman: R\n\nAssistant: A",
            "\n\nHuman: Q\n\nAssistant: B1\n\nHuman: R\n\nAssistant: B",
            PARTED,
        ),
        ("\n\nHuman: Q\n\nAssistant: A", "\n\nHuman: Q\n\nAssistant: ", BROKEN),
        ("\n\nHuman: Q\n\nHuman: R\n\nAssistant: A", "\n\nHuman: Q\n\nAssistant: B", BROKEN),
    ],
)
def test_dialogues_that_cannot_be_compared_are_told_apart(chosen: str, rejected: str, reason: str) -> None:
    assert to_pair({"chosen": chosen, "rejected": rejected}, "hh_rlhf", "f:1") == Unusable(reason)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "Q", "chosen": "A"}, "fits no known format"),
        ({"prompt": "Q", "chosen": "A", "rejected": ""}, r"answer is empty \(rejected\)"),
        ({"prompt": "Q", "chosen": " \n", "rejected": "B"}, r"answer is empty \(chosen\)"),
        ({"prompt": "Q", "chosen": "A", "rejected": None}, "rejected is not a list"),
        ({"prompt": 3, "chosen": "A", "rejected": "B"}, "prompt is not a list"),
        ({"prompt": [turn("user", "Q"), turn("assistant", "A0")], "chosen": "A", "rejected": "B"}, "turn of the user"),
        ({"prompt": [], "chosen": "A", "rejected": "B"}, "turn of the user is missing"),
        (
            {"prompt": "Q", "chosen": [turn("user", "Q"), turn("assistant", "A")], "rejected": "B"},
            "chosen is not one answer",
        ),
        ({"conversations": [said("gpt", "Q")], "chosen": "A", "rejected": "B"}, "turn of the user is missing"),
        ({"conversations": [said("human", "Q")], "chosen": said("human", "A"), "rejected": "B"}, "is not one answer"),
        ({"chosen": "A", "rejected": "B"}, "chosen is no dialogue"),
        ({"chosen": ASKED + "A", "rejected": "B"}, "rejected is not in the Alpaca template"),
        ({"prompt": ASKED + "A", "chosen": "A", "rejected": "B"}, "goes on behind ### Response"),
        ({"prompt": "Q", "chosen": "\ud83d", "rejected": "B"}, "half a character"),
    ],
)
def test_wrong_rows_are_one_error(row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        to_pair(row, detect_pair_format(row, "rows.jsonl:7"), "rows.jsonl:7")
    assert caught.value.where == "rows.jsonl:7"


def test_tools_are_offered_on_both_sides_and_an_answer_that_calls_one_is_refused() -> None:
    calls = [{"function": {"name": "add", "arguments": {}}}]
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [{"type": "function"}]}
    pair = to_pair(row, "preference", "f:1")
    assert isinstance(pair, PreferencePair)
    assert [side.tools for side in pair.conversations()] == ['[{"type": "function"}]'] * 2
    calling = {"role": "assistant", "content": "I add", "tool_calls": calls}
    with pytest.raises(DataError, match="chosen calls a tool"):
        to_pair({**row, "chosen": calling}, "preference", "f:1")
    question = {"role": "user", "content": "Q"}
    whole = {"chosen": [question, {"role": "assistant", "content": "A"}], "rejected": [question, calling]}
    with pytest.raises(DataError, match="rejected calls a tool"):
        to_pair(whole, "hh_rlhf", "f:1")
