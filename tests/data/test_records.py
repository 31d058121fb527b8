"""Rules of a conversation: what is accepted, and what each breach is called."""

import pytest

from anima.data.records import Conversation, Message, find_problem
from anima.errors import DataError

SYSTEM, USER, ANSWER = Message("system", "S"), Message("user", "Q"), Message("assistant", "A")
CALL = Message("assistant", "", tool_calls="[{}]")


@pytest.mark.parametrize("messages", [(USER, ANSWER), (SYSTEM, USER, ANSWER), (USER, ANSWER, USER, ANSWER)])
def test_conversations_in_order_are_accepted(messages: tuple[Message, ...]) -> None:
    assert Conversation(messages, "f:1").messages == messages


@pytest.mark.parametrize(
    ("messages", "index", "field", "what"),
    [
        ((), 0, "role", "no turns"),
        ((SYSTEM,), 0, "role", "no turns"),
        ((ANSWER,), 0, "role", "turn of the user is missing"),
        ((USER, USER, ANSWER), 1, "role", "turn of the assistant is missing"),
        ((SYSTEM, SYSTEM, USER, ANSWER), 1, "role", "turn of the user is missing"),
        ((USER, ANSWER, SYSTEM, USER, ANSWER), 2, "role", "turn of the user is missing"),
        ((USER,), 0, "role", "ends without an answer"),
        ((USER, ANSWER, USER), 2, "role", "ends without an answer"),
        ((USER, Message("assistant", " \n")), 1, "content", "answer is empty"),
        ((SYSTEM, USER, Message("assistant", "")), 2, "content", "answer is empty"),
        ((Message("user", "a\ud83d"), ANSWER), 0, "content", "half a character"),
        ((Message("user", "a", "\udc00"), ANSWER), 0, "content", "half a character"),
        ((USER, CALL, Message("tool", "1", tool_name="\ud83d"), ANSWER), 2, "content", "half a character"),
        ((USER, CALL, Message("tool", "1", tool_call_id="\ud83d"), ANSWER), 2, "content", "half a character"),
    ],
)
def test_each_breach_is_named(messages: tuple[Message, ...], index: int, field: str, what: str) -> None:
    problem = find_problem(messages)
    assert problem is not None
    assert (problem.index, problem.field) == (index, field)
    assert what in problem.what
    with pytest.raises(DataError, match=what) as caught:
        Conversation(messages, "data.jsonl:7")
    assert caught.value.where == "data.jsonl:7"


def test_an_empty_question_is_allowed() -> None:
    assert find_problem((Message("user", ""), ANSWER)) is None


def test_text_joins_content_and_context_by_a_blank_line() -> None:
    assert Message("user", "Sort", "b a").text == "Sort\n\nb a"
    assert Message("user", "Sort").text == "Sort"


def test_tools_that_no_tokenizer_could_read() -> None:
    with pytest.raises(DataError, match=r"half a character \(tools\)") as caught:
        Conversation((USER, ANSWER), "data.jsonl:7", tools='[{"name": "\ud83d"}]')
    assert caught.value.where == "data.jsonl:7"
