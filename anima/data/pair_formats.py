"""Layouts of a row with two answers to one prompt, and how each becomes a PreferencePair.

A new layout is one entry of PAIR_FORMATS. Knows no files; errors name the place that the caller gives.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from anima.data.formats import (
    MESSAGE_ROLES,
    SHAREGPT_SPEAKERS,
    Format,
    Row,
    Turn,
    chat_of,
    detect_format,
    shown,
    text_of,
    value_of,
)
from anima.data.records import Message, PreferencePair, Role, find_problem
from anima.data.text_templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from anima.data.tool_messages import tools_of
from anima.errors import DataError

PARTED = "the two dialogues part before the last answer"
BROKEN = "a dialogue does not alternate, or an answer in it is empty"


@dataclass(frozen=True, slots=True)
class Unusable:
    """A row of a sound layout whose answers cannot be compared: dropped and counted under the reason."""

    reason: str


PairOrReason = PreferencePair | Unusable


Keys = tuple[str, str]
"""The keys of a message's speaker and text."""


def _messages(values: object, key: str, keys: Keys, names: Mapping[str, Role], source: str) -> list[Message]:
    """A list of objects as messages."""
    turns: list[Turn] = chat_of(key, keys[0], keys[1], names)({key: values}, source)
    return [turn.message for turn in turns]


def _answer(row: Row, key: str, keys: Keys, names: Mapping[str, Role], source: str) -> str:
    """An answer: text, a message, or a list of one message."""
    value = value_of(row, key, source)
    if isinstance(value, str):
        return value
    found = _messages([value] if isinstance(value, dict) else value, key, keys, names, source)
    if len(found) != 1 or found[0].role != "assistant":
        raise DataError(
            f"{key} is not one answer",
            where=source,
            got=", ".join(message.role for message in found) or "no messages",
            allowed="text, or one message of the assistant",
            fix="put all turns before the answer into the prompt, which both answers share",
        )
    return _said(found[0], key, source)


def _said(answer: Message, key: str, source: str) -> str:
    """The text of an answer, which must be all of it."""
    if answer.tool_calls:
        raise DataError(
            f"{key} calls a tool",
            where=source,
            got=answer.tool_calls[:60],
            allowed="an answer in words; calls with their results may stand in the prompt",
            fix="remove this row",
        )
    return answer.content


def _preference(row: Row, source: str) -> PairOrReason:
    """`prompt` (text or messages), `chosen`, `rejected` (texts, or one message each)."""
    keys = ("role", "content")
    given = value_of(row, "prompt", source)
    if isinstance(given, str):
        prompt = [Message("user", given)]
    else:
        prompt = _messages(given, "prompt", keys, MESSAGE_ROLES, source)
    answers = [_answer(row, key, keys, MESSAGE_ROLES, source) for key in ("chosen", "rejected")]
    return PreferencePair(tuple(prompt), answers[0], answers[1], source, tools_of(row, source))


def _sharegpt(row: Row, source: str) -> PairOrReason:
    """`conversations` of from and value (and perhaps `system`), `chosen` and `rejected` as such messages or texts."""
    turns = chat_of("conversations", "from", "value", SHAREGPT_SPEAKERS)(row, source)
    answers = [_answer(row, key, ("from", "value"), SHAREGPT_SPEAKERS, source) for key in ("chosen", "rejected")]
    return PreferencePair(tuple(turn.message for turn in turns), answers[0], answers[1], source)


_SPEAKERS: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}


def _hh_dialogue(value: object, key: str, source: str) -> list[Message]:
    """A whole dialogue: messages, or text of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    if isinstance(value, list):
        return _messages(value, key, ("role", "content"), MESSAGE_ROLES, source)
    text = text_of(value, key, source)
    lead, *parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text.lstrip("\n"))
    if lead or not parts:
        raise DataError(
            f"{key} is no dialogue",
            where=source,
            got=shown(text),
            allowed=r"\n\nHuman: ...\n\nAssistant: ..., or a list of messages",
            fix="put the question into a key `prompt`, or name another --dataset_format",
        )
    return [
        Message(_SPEAKERS[speaker], content.strip()) for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]


_ALPACA = re.compile(
    rf"\s*(?:{re.escape(ALPACA_WITH_INPUT)}|{re.escape(ALPACA_WITHOUT_INPUT)})\n\n"
    r"### Instruction:\n(?P<instruction>.*?)(?:\n\n### Input:\n(?P<context>.*?))?\n\n### Response:[ \n]?(?P<answer>.*)",
    re.DOTALL,
)


def _alpaca_text(text: str, key: str, source: str) -> tuple[Message, str]:
    """A text in the Alpaca template taken apart again: the user's message and what stands behind "### Response:"."""
    found = _ALPACA.fullmatch(text)
    if found is None:
        raise DataError(
            f"{key} is not in the Alpaca template",
            where=source,
            got=shown(text),
            allowed="Below is an instruction ... ### Instruction: ... ### Response: ...",
            fix="mend the row, or name another --dataset_format",
        )
    return Message("user", found["instruction"], found["context"] or ""), found["answer"]


def _alpaca_dialogue(value: object, key: str, source: str) -> list[Message]:
    user, answer = _alpaca_text(text_of(value, key, source), key, source)
    return [user, Message("assistant", answer)]


def _alpaca(row: Row, source: str) -> PairOrReason:
    """Texts in the Alpaca template: a `prompt` with two answers, or two whole texts."""
    if "prompt" not in row:
        return _whole(row, _alpaca_dialogue, source)
    user, rest = _alpaca_text(text_of(row["prompt"], "prompt", source), "prompt", source)
    if rest.strip():
        raise DataError("the prompt goes on behind ### Response:", where=source, got=shown(rest), allowed="nothing")
    answers = [text_of(value_of(row, key, source), key, source) for key in ("chosen", "rejected")]
    return PreferencePair((user,), answers[0], answers[1], source)


def _whole(row: Row, parse: Callable[[object, str, str], list[Message]], source: str) -> PairOrReason:
    """Two whole dialogues: all turns but the last must be the same, and are the prompt."""
    chosen, rejected = (tuple(parse(value_of(row, key, source), key, source)) for key in ("chosen", "rejected"))
    if find_problem(chosen) is not None or find_problem(rejected) is not None:
        return Unusable(BROKEN)
    if chosen[:-1] != rejected[:-1]:
        return Unusable(PARTED)
    answers = [_said(said[-1], key, source) for key, said in (("chosen", chosen), ("rejected", rejected))]
    return PreferencePair(chosen[:-1], answers[0], answers[1], source, tools_of(row, source))


def _hh_rlhf(row: Row, source: str) -> PairOrReason:
    """`chosen` and `rejected` as whole dialogues, as in Anthropic's hh-rlhf."""
    return _whole(row, _hh_dialogue, source)


_BY_KEYS: tuple[Format[PairOrReason], ...] = (
    Format("preference", ("prompt", "chosen", "rejected"), _preference, optional=("tools",)),
    Format("sharegpt_preference", ("conversations", "chosen", "rejected"), _sharegpt, absent=("prompt",)),
    Format("hh_rlhf", ("chosen", "rejected"), _hh_rlhf, ("prompt", "conversations"), ("tools",)),
)
PAIR_FORMATS = (*_BY_KEYS, Format("alpaca_preference", ("chosen", "rejected"), _alpaca, optional=("prompt",)))


def detect_pair_format(row: Row, source: str) -> str:
    """The name of the format that a row has: by its keys, and alpaca_preference where the text is in that template.

    A prompt that was rendered already would be rendered a second time as a mere prompt.

    Raises:
        DataError: No format matches.
    """
    name = detect_format(row.keys(), source, _BY_KEYS)
    opening = row["prompt"] if "prompt" in row else row["chosen"]
    return "alpaca_preference" if isinstance(opening, str) and _ALPACA.fullmatch(opening) else name


def to_pair(row: Row, format_name: str, source: str) -> PairOrReason:
    """The row as a checked pair, or the reason for leaving it out.

    Args:
        row: The row's values by key.
        format_name: A name in PAIR_FORMATS.
        source: Where the row is, as `file:line`.

    Raises:
        DataError: A key is missing, a value is of the wrong kind, or there is no conversation.
    """
    return next(f for f in PAIR_FORMATS if f.name == format_name).convert(row, source)
