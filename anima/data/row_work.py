"""Raw rows to token sequences, a batch at a time, with everything that was dropped or changed counted.

A RowWork can be sent to another process. Knows no files and no cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anima.config.schema import DataConfig
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.formats import to_conversation
from anima.data.limits import EncodedRow, RowEncoder
from anima.data.records import Conversation
from anima.data.report import SetReport
from anima.data.segments import Segment
from anima.data.templates import Template
from anima.data.text_files import RawRow, reason_of
from anima.data.tokenizer import Tokenizer
from anima.errors import DataError

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


class RowWork:
    """Converts, renders and encodes rows.

    Args:
        config: Limits and policies.
        tokenizer: The tokenizer.
        template: How a conversation becomes text.

    Raises:
        ModelError: The tokenizer lacks something that the options need.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, template: Template) -> None:
        self._drops_bad_rows = config.bad_rows == "drop"
        self._template = template
        self._encoder = RowEncoder(tokenizer, config)

    def encode(self, batch: RowBatch) -> EncodedBatch:
        """The sequences of a batch.

        Raises:
            DataError: A row cannot be used and the policy is to stop, or it is too long and the policy is error.
        """
        if batch.layout == "text" and self._template.name != "plain":
            raise DataError(
                "a text without turns has no place in a chat template",
                where=batch.name + batch.rows[0].place,
                got=f"--chat_template {self._template.name}",
                allowed="plain",
                fix="use --chat_template plain, which learns the whole text; or name another --dataset_format",
            )
        report = SetReport(rows=len(batch.rows), formats={batch.layout: len(batch.rows)})
        places, rendered = [], []
        for row in batch.rows:
            try:
                rendered.append(self.render(row, batch)[1])
            except DataError as error:
                if not self._drops_bad_rows:
                    raise
                report.drop(BAD_ROW + reason_of(error), batch.file, row.place)
                continue
            places.append(row.place)
        encoded = self._encoder.encode(rendered, [batch.name + place for place in places])
        kept = []
        for found, place in zip(encoded, places, strict=True):
            if found.sequence is None:
                report.drop(str(found.dropped), batch.file, place)
                continue
            _count(report, found, found.sequence)
            if found.trimmed:
                report.trimmed.add(batch.file, place)
            kept.append((found.sequence, batch.file, place))
        lengths = [(found.whole.source, found.whole.target, found.whole.total) for found in encoded]
        return EncodedBatch(kept, np.array(lengths, np.int32).reshape(-1, 3), report)

    def render(self, row: RawRow, batch: RowBatch) -> tuple[Conversation, list[Segment]]:
        """A row as a conversation and as segments of text.

        Raises:
            DataError: The row cannot be used, or not with this template.
        """
        conversation = to_conversation(row.values, batch.layout, batch.name + row.place)
        return conversation, self._template.segments(conversation)

    def encode_segments(self, segments: Sequence[Segment], source: str) -> EncodedRow:
        """What becomes of one rendered row.

        Raises:
            DataError: It is too long and the policy is error.
        """
        return self._encoder.encode([segments], [source])[0]


def _count(report: SetReport, row: EncodedRow, sequence: TokenSequence) -> None:
    report.kept += 1
    report.tokens += len(sequence)
    # The first token of a sequence is predicted from nothing, so its label never counts.
    report.supervised_tokens += int(np.count_nonzero(sequence.labels[1:] != IGNORE_INDEX))
    report.longest = max(report.longest, len(sequence))
    report.answers += row.num_answers
    report.stopped_answers += row.num_stopped
