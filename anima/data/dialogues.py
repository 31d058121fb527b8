"""Dialogues written as one text with speakers' names in it (chip2, hh-rlhf, oasst1), cut into their turns.

The ancestor learned such texts whole, or lost every turn but the first; here only the assistant's turns are learned.
Knows no keys of a row.
"""

import re
from dataclasses import dataclass

from anima.data.records import Role
from anima.errors import DataError


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of sets writes speakers: the pattern has the speaker as its only group."""

    name: str
    speaker: re.Pattern[str]
    roles: dict[str, Role]
    example: str


CHIP2 = Dialect(
    "chip2",
    re.compile(r"(?:^|\n)<(human|bot)>:[ ]?"),
    {"human": "user", "bot": "assistant"},
    r"<human>: Hi\n<bot>: Hello",
)
HH_RLHF = Dialect(
    "hh_rlhf",
    re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?"),
    {"Human": "user", "Assistant": "assistant"},
    r"\n\nHuman: Hi\n\nAssistant: Hello",
)
OASST1 = Dialect(
    "oasst1",
    re.compile(r"(?:^|\n)?### (Human|Assistant):[ ]?"),
    {"Human": "user", "Assistant": "assistant"},
    "### Human: Hi### Assistant: Hello",
)


def split_dialogue(text: str, dialect: Dialect, key: str, source: str) -> list[tuple[Role, str]]:
    """The turns of a dialogue, in order. Text before the first speaker is a system message.

    Raises:
        DataError: No speaker is named in the text.
    """
    parts = dialect.speaker.split(text)
    if len(parts) == 1:
        raise DataError(
            f"{key} is no dialogue of the kind {dialect.name}",
            where=source,
            got=repr(text[:60]),
            allowed=dialect.example,
            fix="mend or remove this row, or name another --dataset_format",
        )
    turns: list[tuple[Role, str]] = [("system", parts[0])] if parts[0].strip() else []
    turns += [(dialect.roles[name], said) for name, said in zip(parts[1::2], parts[2::2], strict=True)]
    return turns


def dialect_of(text: object) -> str:
    """The name of the format of a row's `text`: chip2, oasst1, or text for one without speakers."""
    found = [dialect.name for dialect in (CHIP2, OASST1) if isinstance(text, str) and dialect.speaker.search(text)]
    return found[0] if found else "text"
