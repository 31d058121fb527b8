"""Raw rows to token sequences, a batch at a time, with everything that was dropped or changed counted.

A RowWork can be sent to another process. Knows no files and no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from anima.config.schema import DataConfig
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.kinds import RecordKind
from anima.data.limits import EncodedRow, RowEncoder
from anima.data.pair_formats import Unusable
from anima.data.records import Conversation
from anima.data.report import SetReport
from anima.data.segments import Segment
from anima.data.templates import Template
from anima.data.text_files import RawRow, reason_of
from anima.data.tokenizer import Tokenizer
from anima.errors import DataError

SAME_ANSWERS = "chosen and rejected are the same"
BAD_ROW = "bad row: "
"""Begins the reasons of rows that --bad_rows drop leaves out."""


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Rows of one file (its number and name) in one layout."""

    file: int
    name: str
    layout: str
    rows: Sequence[RawRow]


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """The sequences that were kept, as (sequence, number of the file, place), and what happened to all rows."""

    kept: list[tuple[TokenSequence, int, str]]
    lengths: npt.NDArray[np.int32]
    """Source, target and total tokens of every row that could be rendered, before cutting: (rows, 3)."""
    report: SetReport = field(default_factory=SetReport)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row as the conversations it holds (one, or the two sides of a pair) and the text of each in segments."""

    conversations: tuple[Conversation, ...]
    segments: list[list[Segment]]


class RowWork:
    """Converts, renders and encodes rows.

    Args:
        kind: What a row is.
        config: Limits and policies.
        tokenizer: The tokenizer.
        template: How a conversation becomes text.

    Raises:
        ModelError: The tokenizer lacks something that the options need.
    """

    def __init__(self, kind: RecordKind[Any], config: DataConfig, tokenizer: Tokenizer, template: Template) -> None:
        self._read = kind.read  # and not the kind, which cannot be sent
        self._drops_bad_rows = config.bad_rows == "drop"
        self._template = template
        self._encoder = RowEncoder(tokenizer, config, last_answer_only=kind.last_answer_only)

    def encode(self, batch: RowBatch) -> EncodedBatch:
        """The sequences of a batch.

        Raises:
            DataError: A row cannot be used and the policy is to stop, or it is too long and the policy is error.
        """
        self.check_layout(batch)
        report = SetReport(rows=len(batch.rows), formats={batch.layout: len(batch.rows)})
        places, rendered = [], []
        for row in batch.rows:
            try:
                found = self.render(row, batch)
            except DataError as error:
                if not self._drops_bad_rows:
                    raise
                report.drop(BAD_ROW + reason_of(error), batch.file, row.place)
                continue
            if isinstance(found, Unusable):
                report.drop(found.reason, batch.file, row.place)
                continue
            rendered.append(found.segments)
            places.append(row.place)
        encoded = self._encoder.encode(rendered, [batch.name + place for place in places])
        kept = []
        for became, place in zip(encoded, places, strict=True):
            if not became.sequences:
                report.drop(str(became.dropped), batch.file, place)
                continue
            if same_answers(became):
                report.drop(SAME_ANSWERS, batch.file, place)
                continue
            _count(report, became)
            if became.trimmed:
                report.trimmed.add(batch.file, place)
            kept += [(sequence, batch.file, place) for sequence in became.sequences]
        lengths = [(became.whole.source, became.whole.target, became.whole.total) for became in encoded]
        return EncodedBatch(kept, np.array(lengths, np.int32).reshape(-1, 3), report)

    def check_layout(self, batch: RowBatch) -> None:
        """Whether rows of this layout go with the template at all, whatever is in them.

        Raises:
            DataError: They do not, whatever the policy for bad rows is.
        """
        if batch.layout == "text" and self._template.name != "plain":
            raise DataError(
                "a text without turns has no place in a chat template",
                where=batch.name + batch.rows[0].place,
                got=f"--chat_template {self._template.name}",
                allowed="plain",
                fix="use --chat_template plain, which learns the whole text; or name another --dataset_format",
            )

    def render(self, row: RawRow, batch: RowBatch) -> Rendered | Unusable:
        """A row as text, or why it cannot be used.

        Raises:
            DataError: The row is wrong, or does not go with this template.
        """
        found = self._read(row.values, batch.layout, batch.name + row.place)
        if isinstance(found, Unusable):
            return found
        return Rendered(found, [self._template.segments(conversation) for conversation in found])

    def encode_one(self, rendered: Rendered) -> EncodedRow:
        """What becomes of one rendered row.

        Raises:
            DataError: It is too long and the policy is error, or the prompts of a pair differ.
        """
        return self._encoder.encode([rendered.segments], [rendered.conversations[0].source])[0]


def same_answers(row: EncodedRow) -> bool:
    """Whether the two sides of a pair are the same to the token, so that there is nothing to prefer."""
    return len(row.sequences) > 1 and len({side.input_ids.tobytes() for side in row.sequences}) == 1


def _count(report: SetReport, row: EncodedRow) -> None:
    report.kept += 1
    for sequence in row.sequences:
        report.tokens += len(sequence)
        # The first token of a sequence is predicted from nothing, so its label never counts.
        report.supervised_tokens += int(np.count_nonzero(sequence.labels[1:] != IGNORE_INDEX))
        report.longest = max(report.longest, len(sequence))
    report.answers += row.num_answers
    report.stopped_answers += row.num_stopped
