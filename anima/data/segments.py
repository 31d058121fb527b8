"""A conversation as text in pieces that know whether they are learned; what every template has to offer.

The pieces put together are byte for byte the chat prompt; knows no template.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from anima.data.records import Conversation, Message


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the rendered text.

    trainable: part of an answer: its text, its stop token, and whatever the model must say in between.
    trimmable: the user's text, which may be shortened from its start.
    literal: text from the data, in which a spelled-out special token (`<|im_end|>`) stays plain characters;
        the other pieces are the template's own, in which it is the control token.
    """

    text: str
    trainable: bool
    trimmable: bool = False
    literal: bool = False


class Template(Protocol):
    """How messages become text; the same object serves training, evaluation and chat."""

    @property
    def name(self) -> str:
        """The template's name as in --chat_template."""

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the template renders differently."""

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole conversation; every answer ends in a trainable stop token."""

    def prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        """What stands before the answer to `messages`, which end in a user turn: the start of `segments`."""

    def prompt(self, messages: Sequence[Message]) -> str:
        """`prompt_segments` as text; to get its ids as in training, give the segments to Encoder.prompt_ids."""


def join(segments: Sequence[Segment]) -> str:
    """The text of the segments together."""
    return "".join(segment.text for segment in segments)


def user_segments(message: Message, separator: str = "\n\n") -> list[Segment]:
    """A user's text. Where it has a context (a document to work on), only that may be shortened, not the task."""
    if not message.context:
        return [Segment(message.content, trainable=False, trimmable=True, literal=True)]
    return [
        Segment(message.content, trainable=False, literal=True),
        Segment(separator, trainable=False),
        Segment(message.context, trainable=False, trimmable=True, literal=True),
    ]
