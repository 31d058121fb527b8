"""Layouts of a row: which keys tell them apart, and how each becomes a Conversation.

A new layout is one entry of FORMATS. Knows no files; errors name the place that the caller gives.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from anima.data.dialogues import CHIP2, HH_RLHF, OASST1, Dialect, dialect_of, split_dialogue
from anima.data.records import ROLES, Conversation, Message, Role, find_problem
from anima.data.tool_messages import tool_calls_of, tools_of
from anima.errors import DataError


@dataclass(frozen=True, slots=True)
class Turn:
    """A message and the keys of the row that hold its role and its text, for error messages."""

    message: Message
    role_key: str
    content_key: str


Row = Mapping[str, object]
Converted = TypeVar("Converted", covariant=True)
Convert = Callable[[Row, str], list[Turn]]


@dataclass(frozen=True)
class Format(Generic[Converted]):
    """A layout. A row has it when it holds all of `keys` and none of `absent`; other columns do not matter.

    One that is not `detected` has to be named: its rows could be meant otherwise, or it is another name of a format.
    """

    name: str
    keys: tuple[str, ...]
    convert: Callable[[Row, str], Converted]
    absent: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    detected: bool = True

    def __str__(self) -> str:
        return f"{self.name} ({', '.join((*self.keys, *(f'[{key}]' for key in self.optional)))})"


def shown(value: object) -> str:
    """A value as an error shows it: its start and its type."""
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def value_of(row: Row, key: str, source: str, path: str = "") -> object:
    """What the row holds under a key; `path` stands before the key in the error.

    Raises:
        DataError: The row has no such key.
    """
    if key not in row:
        raise DataError(
            f"the row has no key {path}{key}",
            where=source,
            got=f"keys {', '.join(map(repr, row)) or '(none)'}",
            fix="mend the row, or name another --dataset_format",
        )
    return row[key]


def text_of(value: object, key: str, source: str) -> str:
    """The value as text.

    Raises:
        DataError: It is something else.
    """
    if not isinstance(value, str):
        raise DataError(
            f"{key} is not text", where=source, got=shown(value), allowed="a string", fix=f"write {key} as a string"
        )
    return value


def _optional_text(row: Row, key: str, source: str) -> str:
    """The text under a key, or "" where the key is missing, null or NaN (how tables say that there is none)."""
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return text_of(value, key, source)


def chat_of(list_key: str, role_key: str, content_key: str, roles: Mapping[str, Role]) -> Convert:
    """A converter of chats: a list of objects under `list_key`, and perhaps a `system` text beside it."""

    def convert(row: Row, source: str) -> list[Turn]:
        items = value_of(row, list_key, source)
        if not isinstance(items, list):
            raise DataError(f"{list_key} is not a list", where=source, got=shown(items), allowed="a list of messages")
        turns = []
        system = _optional_text(row, "system", source) if list_key == "conversations" else ""
        if system.strip():
            turns.append(Turn(Message("system", system), "system", "system"))
        for i, item in enumerate(items):
            path = f"{list_key}[{i}]."
            if not isinstance(item, dict):
                raise DataError(f"{path[:-1]} is not an object", where=source, got=shown(item), allowed="an object")
            speaker = text_of(value_of(item, role_key, source, path), path + role_key, source)
            calls = tool_calls_of(item, path, source)
            no_text = bool(calls) and item.get(content_key) is None
            content = "" if no_text else text_of(value_of(item, content_key, source, path), path + content_key, source)
            if speaker not in roles:
                raise DataError(
                    f"{path}{role_key} is no known speaker", where=source, got=repr(speaker), allowed=", ".join(roles)
                )
            name, call_id = (_optional_text(item, key, source) for key in ("name", "tool_call_id"))
            message = Message(roles[speaker], content, tool_calls=calls)
            if message.role == "tool":
                message = Message("tool", content, tool_name=name, tool_call_id=call_id)
            elif calls and message.role != "assistant":
                raise DataError(f"{path}tool_calls: only the assistant calls tools", where=source, got=repr(speaker))
            turns.append(Turn(message, path + role_key, path + content_key))
        return turns

    return convert


def _alpaca(row: Row, source: str) -> list[Turn]:
    instruction = text_of(value_of(row, "instruction", source), "instruction", source)
    context = _optional_text(row, "input", source)
    output = text_of(value_of(row, "output", source), "output", source)
    return [
        Turn(Message("user", instruction, context), "instruction", "instruction"),
        Turn(Message("assistant", output), "output", "output"),
    ]


def _pair(prompt_key: str, answer_key: str) -> Convert:
    """A converter of one prompt and one answer."""

    def convert(row: Row, source: str) -> list[Turn]:
        if isinstance(row.get(prompt_key), list) and isinstance(row.get(answer_key), list):
            return _lists(row, prompt_key, answer_key, source)
        prompt = text_of(value_of(row, prompt_key, source), prompt_key, source)
        answer = text_of(value_of(row, answer_key, source), answer_key, source)
        return [
            Turn(Message("user", prompt), prompt_key, prompt_key),
            Turn(Message("assistant", answer), answer_key, answer_key),
        ]

    return convert


def _lists(row: Row, prompt_key: str, answer_key: str, source: str) -> list[Turn]:
    """A list of questions and one of their answers, as Chinese-Vicuna's chat sets have them."""
    columns: list[tuple[Role, str]] = [("user", prompt_key), ("assistant", answer_key)]
    lists = [value_of(row, key, source) for _, key in columns]
    sizes = [len(values) for values in lists if isinstance(values, list)]
    if sizes[0] != sizes[1]:
        what = f"{prompt_key} and {answer_key} are lists of different lengths"
        raise DataError(what, where=source, got=f"{sizes[0]} and {sizes[1]}", fix="mend or remove this row")
    turns = []
    for i in range(sizes[0]):
        for (role, key), values in zip(columns, lists, strict=True):
            name = f"{key}[{i}]"
            turns.append(Turn(Message(role, text_of(values[i], name, source)), name, name))  # type: ignore[index]
    return turns


def _dialogue(key: str, dialect: Dialect) -> Convert:
    """A converter of a dialogue in one text."""

    def convert(row: Row, source: str) -> list[Turn]:
        text = text_of(value_of(row, key, source), key, source)
        return [Turn(Message(role, said), key, key) for role, said in split_dialogue(text, dialect, key, source)]

    return convert


def _whole_text(row: Row, source: str) -> list[Turn]:
    """A text without turns, all learned: the answer to an empty prompt, which only the plain template keeps empty."""
    text = text_of(value_of(row, "text", source), "text", source)
    return [Turn(Message("user", ""), "text", "text"), Turn(Message("assistant", text), "text", "text")]


MESSAGE_ROLES: Mapping[str, Role] = {role: role for role in ROLES}
SHAREGPT_SPEAKERS: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
}

FORMATS: tuple[Format[list[Turn]], ...] = (
    Format("messages", ("messages",), chat_of("messages", "role", "content", MESSAGE_ROLES), optional=("tools",)),
    Format(
        "sharegpt",
        ("conversations",),
        chat_of("conversations", "from", "value", SHAREGPT_SPEAKERS),
        optional=("system",),
    ),
    Format("alpaca", ("instruction", "output"), _alpaca, optional=("input",)),
    Format("prompt_completion", ("prompt", "completion"), _pair("prompt", "completion")),
    Format("input_output", ("input", "output"), _pair("input", "output"), absent=("instruction",)),
    Format("chip2", ("text",), _dialogue("text", CHIP2)),
    Format("oasst1", ("text",), _dialogue("text", OASST1)),
    Format("text", ("text",), _whole_text),
    Format("alpaca_clean", ("instruction", "output"), _alpaca, optional=("input",), detected=False),
    Format("self_instruct", ("prompt", "completion"), _pair("prompt", "completion"), detected=False),
    Format("long_data", ("prompt", "completion"), _pair("prompt", "completion"), detected=False),
    Format("hh_rlhf_chosen", ("chosen",), _dialogue("chosen", HH_RLHF), optional=("rejected",), detected=False),
)


def detect_format(keys: Collection[str], source: str, formats: Sequence[Format[object]] = FORMATS) -> str:
    """The name of the one format that a row with these keys has.

    Args:
        keys: The row; or only its keys, and then a row of one `text` cannot be told from other such rows.
        source: Where the row is.
        formats: Those to choose from.

    Raises:
        DataError: No format matches, or more than one.
    """
    known = "; ".join(map(str, formats))
    fitting = [f for f in formats if set(f.keys) <= set(keys) and not set(f.absent) & set(keys) and f.detected]
    matches = [f.name for f in fitting]
    if isinstance(keys, Mapping) and {f.keys for f in fitting} == {("text",)}:
        matches = [dialect_of(keys["text"])]
    if len(matches) == 1:
        return matches[0]
    raise DataError(
        f"the row fits more than one format: {', '.join(matches)}" if matches else "the row fits no known format",
        where=source,
        got=f"keys {', '.join(map(repr, keys)) or '(none)'}",
        allowed=known,
        fix="name one with --dataset_format" if matches else _way_in(keys),
    )


def _way_in(keys: Collection[str]) -> str:
    """What to do with a row that fits no format."""
    if not {"chosen", "rejected"} <= set(keys):
        return "rename the columns to those of a format"
    dialogues = isinstance(keys, Mapping) and HH_RLHF.speaker.search(str(keys["chosen"])) is not None
    return "these are preferences: --objective dpo" + (
        "; to learn the chosen dialogues: --dataset_format hh_rlhf_chosen" if dialogues else ""
    )


def to_conversation(row: Row, format_name: str, source: str) -> Conversation:
    """The row as a checked Conversation.

    Args:
        row: The row's values by key.
        format_name: A name in FORMATS.
        source: Where the row is, as `file:line`.

    Raises:
        DataError: A key is missing, a value is no text, or the messages are no conversation.
    """
    chosen = next(f for f in FORMATS if f.name == format_name)
    turns = chosen.convert(row, source)
    messages = tuple(turn.message for turn in turns)
    problem = find_problem(messages)
    if problem is not None:
        if turns:
            turn = turns[problem.index]
            key = turn.role_key if problem.field == "role" else turn.content_key
        else:
            key = chosen.keys[0]
        raise DataError(
            f"{problem.what} ({key})",
            where=source,
            got=problem.got,
            allowed=problem.allowed,
            fix="mend or remove this row",
        )
    return Conversation(messages, source, tools_of(row, source) if format_name == "messages" else "")
