"""The typed records, checked when they are made: a conversation that ends in an answer; a prompt with two answers.

Knows neither files nor formats nor text templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anima.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")
HALF_CHARACTER = "the text holds half a character"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `context` is the `input` of an Alpaca row, which only the Alpaca template sets apart.

    An answer that calls tools holds them in `tool_calls` (a JSON list) and may have no content; a tool's result has the
    role tool, and perhaps the tool's name and the call's id.
    """

    role: Role
    content: str
    context: str = ""
    tool_calls: str = ""
    tool_name: str = ""
    tool_call_id: str = ""

    @property
    def text(self) -> str:
        """Content and context as one text, for every template but Alpaca's."""
        return f"{self.content}\n\n{self.context}" if self.context else self.content


@dataclass(frozen=True, slots=True)
class Problem:
    """Why messages are no conversation: which message, which of its fields, what is wrong, what would be right."""

    index: int
    field: Literal["role", "content"]
    what: str
    got: str
    allowed: str


def find_problem(messages: Sequence[Message]) -> Problem | None:
    """The first breach of the rules, or None.

    A system message only first; user and assistant in turn, between them perhaps calls of tools with their results;
    the last is the assistant; every answer holds more than white space or a call; every text is valid Unicode.
    """
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    skipped = len(messages) - len(turns)
    if not turns:
        got = f"{len(messages)} messages"
        return Problem(0, "role", "the conversation has no turns", got, "a question and an answer")
    for i, message in enumerate(turns):
        expected = _next_roles(turns[i - 1] if i else None)
        if message.role not in expected:
            allowed = "system only first, then user and assistant in turn; results of tools after their calls"
            return Problem(skipped + i, "role", f"the turn of the {expected[0]} is missing", message.role, allowed)
    for i, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
            return Problem(i, "content", "the answer is empty", repr(message.content), "an answer with some text")
        texts = (message.content, message.context, message.tool_calls, message.tool_name, message.tool_call_id)
        broken = next((text for text in texts if not _encodable(text)), None)
        if broken is not None:
            return Problem(i, "content", HALF_CHARACTER, ascii(broken)[:60], "valid Unicode")
    if turns[-1].role != "assistant":
        last = len(messages) - 1
        return Problem(last, "role", "the conversation ends without an answer", turns[-1].role, "assistant as the last")
    return None


def _next_roles(before: Message | None) -> tuple[Role, ...]:
    """Who may speak after a message; the usual one first."""
    if before is None:
        return ("user",)
    if before.role == "assistant":
        return ("tool",) if before.tool_calls else ("user",)
    return ("assistant", "tool") if before.role == "tool" else ("assistant",)


def _encodable(text: str) -> bool:
    """Whether UTF-8 can hold the text; a lone surrogate from a JSON escape such as \\ud83d cannot be."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Checked messages, where they come from (`file:line`), and the tools the model may call (a JSON list, or "").

    Raises:
        DataError: The messages break a rule of `find_problem`, or the tools are no valid Unicode.
    """

    messages: tuple[Message, ...]
    source: str
    tools: str = ""

    def __post_init__(self) -> None:
        problem = find_problem(self.messages)
        if problem is not None:
            raise DataError(
                f"{problem.what} (message {problem.index + 1})",
                where=self.source,
                got=problem.got,
                allowed=problem.allowed,
                fix="mend or remove this row",
            )
        if not _encodable(self.tools):
            raise DataError(
                f"{HALF_CHARACTER} (tools)",
                where=self.source,
                got=ascii(self.tools)[:60],
                allowed="valid Unicode",
                fix="mend or remove this row",
            )


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt, which ends in a user's turn, with the answer that was preferred and the one that was not.

    The two may be the same; whether such a pair is used is the caller's business. `tools` are those of a Conversation.

    Raises:
        DataError: The prompt with one of the answers is no conversation.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    tools: str = ""

    def __post_init__(self) -> None:
        for name in ("chosen", "rejected"):
            problem = find_problem((*self.prompt, Message("assistant", getattr(self, name))))
            if problem is not None:
                place = name if problem.index == len(self.prompt) else f"message {problem.index + 1} of the prompt"
                raise DataError(
                    f"{problem.what} ({place})",
                    where=self.source,
                    got=problem.got,
                    allowed=problem.allowed,
                    fix="mend or remove this row",
                )

    def conversations(self) -> tuple[Conversation, Conversation]:
        """The prompt with the chosen answer, and with the rejected one."""
        chosen, rejected = (
            Conversation((*self.prompt, Message("assistant", answer)), self.source, self.tools)
            for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected
