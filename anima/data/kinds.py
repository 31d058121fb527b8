"""The two kinds of records a run can train on, conversations and preference pairs: all that differs between them.

A row becomes one conversation, or two with the same prompt; from there on both are tokenised sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from anima.data.dataset import TokenizedDataset
from anima.data.formats import Row, detect_format, to_conversation
from anima.data.order import IndexArray
from anima.data.pair_formats import Unusable, detect_pair_format, to_pair
from anima.data.pairs import PairDataset
from anima.data.records import Conversation


class Splittable(Protocol):
    """A set of which a part can be held out."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def select(self, indices: IndexArray) -> Self:
        """The examples of these numbers, in this order."""
        ...

    @property
    def files(self) -> npt.NDArray[np.int32]:
        """The number of the data file of each example."""
        ...

    def source(self, index: int) -> str:
        """Where the example comes from, as `file:line`."""
        ...


Dataset = TypeVar("Dataset", bound=Splittable)


@dataclass(frozen=True)
class RecordKind(Generic[Dataset]):
    """How rows of a kind are read and what they become.

    Attributes:
        name: What one of them is called, in the plural.
        detect: (row, source) -> the name of its layout.
        read: (row, layout, source) -> the conversations to render, or why the row cannot be used; a function of a
            module, because it is sent to other processes.
        dataset: The set over the sequences of all rows.
        last_answer_only: Whether only the last answer of a conversation is learned.
        notes: What a person should know about a set before training on it.
    """

    name: str
    detect: Callable[[Row, str], str]
    read: Callable[[Row, str, str], tuple[Conversation, ...] | Unusable]
    dataset: Callable[[TokenizedDataset], Dataset]
    last_answer_only: bool
    notes: Callable[[Dataset], list[str]]


def _read_conversation(row: Row, layout: str, source: str) -> tuple[Conversation, ...]:
    return (to_conversation(row, layout, source),)


def _read_pair(row: Row, layout: str, source: str) -> tuple[Conversation, ...] | Unusable:
    pair = to_pair(row, layout, source)
    return pair if isinstance(pair, Unusable) else pair.conversations()


def _length_note(pairs: PairDataset) -> list[str]:
    longer, equal = pairs.chosen_longer()
    return [
        f"the chosen answer is the longer one in {longer:.0%} of the pairs (equally long in {equal:.0%}): whoever only "
        f"prefers length reaches an accuracy of {pairs.longer_wins():.2f}"
    ]


CONVERSATIONS: RecordKind[TokenizedDataset] = RecordKind(
    name="sequences",
    detect=detect_format,
    read=_read_conversation,
    dataset=lambda sequences: sequences,
    last_answer_only=False,
    notes=lambda _: [],
)
PAIRS: RecordKind[PairDataset] = RecordKind(
    name="pairs",
    detect=detect_pair_format,
    read=_read_pair,
    dataset=PairDataset,
    last_answer_only=True,
    notes=_length_note,
)
