"""Layouts of rows: detection by keys, conversion, and errors that name the place and the key."""

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from anima.config.schema import DatasetFormat
from anima.data.formats import FORMATS, detect_format, to_conversation
from anima.data.pair_formats import PAIR_FORMATS
from anima.data.records import Message
from anima.errors import DataError

U, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


def test_the_table_and_the_flag_name_the_same_formats() -> None:
    assert ["auto", *(layout.name for layout in (*FORMATS, *PAIR_FORMATS))] == list(get_args(DatasetFormat))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["messages", "id"], "messages"),
        (["conversations"], "sharegpt"),
        (["id", "conversations", "system"], "sharegpt"),
        (["instruction", "input", "output"], "alpaca"),
        (["instruction", "output"], "alpaca"),
        (["prompt", "completion"], "prompt_completion"),
        (["input", "output"], "input_output"),
    ],
)
def test_keys_decide_the_format(keys: list[str], name: str) -> None:
    assert detect_format(keys, "f:1") == name


def test_unknown_keys_are_listed_with_what_would_fit() -> None:
    with pytest.raises(DataError) as caught:
        detect_format(["question", "answer"], "qa.csv:2")
    assert caught.value.where == "qa.csv:2"
    assert caught.value.got == "keys 'question', 'answer'"
    assert "alpaca (instruction, output, [input])" in str(caught.value.allowed)


def test_two_matching_formats_are_an_error() -> None:
    with pytest.raises(DataError, match="messages, prompt_completion") as caught:
        detect_format(["messages", "prompt", "completion"], "f:1")
    assert "--dataset_format" in str(caught.value.fix)


def test_messages() -> None:
    row = {"messages": [{"role": "system", "content": "S"}, U, A], "id": 3}
    conversation = to_conversation(row, "messages", "f:1")
    assert conversation.messages == (Message("system", "S"), Message("user", "Q"), Message("assistant", "A"))


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "chatgpt", "bard"])
def test_sharegpt(user: str, assistant: str) -> None:
    turns = [{"from": user, "value": "Q"}, {"from": assistant, "value": "A"}]
    plain = to_conversation({"conversations": turns, "system": " "}, "sharegpt", "f:1")
    assert plain.messages == (Message("user", "Q"), Message("assistant", "A"))
    with_system = to_conversation({"conversations": turns, "system": "S"}, "sharegpt", "f:1")
    assert with_system.messages == (Message("system", "S"), *plain.messages)


@pytest.mark.parametrize("absent", [{}, {"input": None}, {"input": math.nan}, {"input": ""}])
def test_alpaca_without_input(absent: dict[str, Any]) -> None:
    conversation = to_conversation({"instruction": "Add", "output": "3", **absent}, "alpaca", "f:1")
    assert conversation.messages == (Message("user", "Add"), Message("assistant", "3"))


def test_alpaca_keeps_the_input_apart() -> None:
    conversation = to_conversation({"instruction": "Sort", "input": "b a", "output": "a b"}, "alpaca", "f:1")
    assert conversation.messages[0] == Message("user", "Sort", context="b a")


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("input", "output")])
def test_pairs(keys: tuple[str, str]) -> None:
    conversation = to_conversation({keys[0]: "P", keys[1]: "C"}, "_".join(keys), "f:1")
    assert conversation.messages == (Message("user", "P"), Message("assistant", "C"))


@pytest.mark.parametrize(
    ("layout", "row", "what"),
    [
        ("alpaca", {"instruction": "Add"}, "no key output"),
        ("alpaca", {"instruction": 3, "output": "3"}, "instruction is not text"),
        ("alpaca", {"instruction": "Add", "output": 3}, "output is not text"),
        ("alpaca", {"instruction": "Add", "output": None}, "output is not text"),
        ("alpaca", {"instruction": "Add", "output": " "}, r"answer is empty \(output\)"),
        ("alpaca", {"instruction": "Add", "output": "3", "input": 2}, "input is not text"),
        ("prompt_completion", {"prompt": "P", "completion": True}, "completion is not text"),
        ("messages", {"messages": "[]"}, "messages is not a list"),
        ("messages", {"messages": []}, r"no turns \(messages\)"),
        ("messages", {"messages": [U, "A"]}, r"messages\[1\] is not an object"),
        ("messages", {"messages": [U, {"role": "assistant"}]}, r"no key messages\[1\].content"),
        (
            "messages",
            {"messages": [U, {"role": "tool", "content": "x"}]},
            r"turn of the assistant is missing \(messages\[1\].role\)",
        ),
        ("messages", {"messages": [U, {"role": "bot", "content": "x"}]}, r"messages\[1\].role is no known speaker"),
        ("messages", {"messages": [U, {"role": "assistant", "content": [{"type": "text"}]}]}, r"content is not text"),
        ("messages", {"messages": [U, A, U]}, r"ends without an answer \(messages\[2\].role\)"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "A"}]}, r"missing \(conversations\[0\].from\)"),
        ("sharegpt", {"conversations": [], "system": "S"}, r"no turns \(system\)"),
    ],
)
def test_a_wrong_row_is_named_by_place_and_key(layout: str, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        to_conversation(row, layout, "rows.jsonl:12")
    assert caught.value.where == "rows.jsonl:12"


def test_golden_rows_of_the_ancestor(shared_data_dir: Path) -> None:
    cases = json.loads((shared_data_dir / "golden_cases.json").read_text("utf-8"))["format_cases"]
    names = {"alpaca": "alpaca", "input-output": "input_output", "long_data": "prompt_completion"}
    seen = 0
    for case in cases:
        if case["format"] in names:
            answer = to_conversation(case["row"], names[case["format"]], "golden").messages[-1]
            assert answer == Message("assistant", case["target"])
            seen += 1
    assert seen == 6
