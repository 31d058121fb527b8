"""Single rows as training sees them: every piece of text with its tokens, its speaker, and whether it is learned.

Goes through the same conversion, template and encoder as training. Knows neither terminals nor pages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

from anima.config.schema import DataConfig
from anima.data.encode import IGNORE_INDEX, Encoder, Run
from anima.data.kinds import RecordKind
from anima.data.limits import EncodedRow
from anima.data.pair_formats import Unusable
from anima.data.records import Conversation
from anima.data.report import SetReport
from anima.data.row_batches import row_batches
from anima.data.row_work import SAME_ANSWERS, Rendered, RowBatch, RowWork, same_answers
from anima.data.segments import Segment
from anima.data.sources import resolve
from anima.data.templates import Template
from anima.data.text_files import RawRow
from anima.data.tokenizer import Tokenizer, special_tokens
from anima.errors import DataError

TEMPLATE = "template"
"""The speaker of text that the template brings."""

FIRST_ROWS = 3
"""Rows that are shown where none are named."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The shortest run of tokens that is whole text: one token, or several that share a character."""

    text: str
    ids: tuple[int, ...]
    role: str
    learned: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """A row, ready to be shown.

    status: kept, trimmed, or why it is left out. cut: the user's text that trimming took away.
    """

    source: str
    layout: str
    status: str
    kept: bool
    tokens: int
    learned: int
    pieces: tuple[Piece, ...]
    cut: str = ""


class SampleReader:
    """Makes samples: one of a row, or two of a pair.

    Args:
        kind: What a row is.
        config: As for training.
        tokenizer: The model's tokenizer.
        template: The template to render with.
    """

    def __init__(self, kind: RecordKind[Any], config: DataConfig, tokenizer: Tokenizer, template: Template) -> None:
        self._kind = kind
        self._config = config
        self._tokenizer = tokenizer
        self._work = RowWork(kind, config, tokenizer, template)
        self._encoder = Encoder(tokenizer)
        self._special = frozenset(special_tokens(tokenizer).values())

    def read(self, flag: str, wanted: Sequence[str]) -> list[Sample]:
        """The samples of the wanted rows, in the order in which they stand in the files.

        Args:
            flag: train_files or eval_files.
            wanted: Numbers of rows from 1 over all files, or places such as `a.jsonl:7`; none: the first rows.

        Raises:
            DataError: A row is not there, or a file cannot be read.
        """
        left = set(wanted)
        samples = []
        if not wanted:
            for row, batch in islice(self._rows(flag), FIRST_ROWS):
                samples += self._samples(row, batch)
            if samples:
                return samples
        for number, (row, batch) in enumerate(self._rows(flag), start=1):
            names = {str(number), batch.name + row.place, batch.name + row.place.replace(": row ", ":")}
            if names & left:
                left -= names
                samples += self._samples(row, batch)
                if not left:
                    return samples
        raise DataError(
            "there is no such row",
            where="--rows",
            got=", ".join(sorted(left)) or "no row that can be read",
            allowed="numbers from 1 over all files, or places as reports name them, such as data.jsonl:7",
            fix="look with `check`, which names the rows that cannot be read at all",
        )

    def _rows(self, flag: str) -> Iterator[tuple[RawRow, RowBatch]]:
        names = self._config.train_files if flag == "train_files" else self._config.eval_files
        sources = resolve(names, flag, weights=flag == "train_files", streaming=self._config.hub_streaming)
        for batch in row_batches(self._config, self._kind.detect, sources, SetReport()):
            for row in batch.rows:
                yield row, batch

    def _samples(self, row: RawRow, batch: RowBatch) -> list[Sample]:
        source = batch.name + row.place
        try:
            self._work.check_layout(batch)
            rendered = self._work.render(row, batch)
            if isinstance(rendered, Unusable):
                return [_raw(row, source, batch.layout, rendered.reason)]
            found = self._work.encode_one(rendered)
        except DataError as error:
            return [_raw(row, source, batch.layout, error.what)]
        status = f"left out, {SAME_ANSWERS}" if same_answers(found) else _status(found, self._config)
        kept = bool(found.sequences) and not same_answers(found)
        return [
            self._sample(rendered, side, found, Sample(name, batch.layout, status, kept, 0, 0, ()))
            for side, name in enumerate([f"{source} {word}".rstrip() for word in _side_names(rendered)])
        ]

    def _sample(self, rendered: Rendered, side: int, found: EncodedRow, frame: Sample) -> Sample:
        """The frame filled with the pieces of one side."""
        segments = rendered.segments[side]
        shown = segments if found.left is None else found.left[side]
        pieces = self._pieces(shown, rendered.conversations[side])
        if self._config.train_on == "all":
            pieces = [replace(piece, learned=True) for piece in pieces]
        return replace(
            frame,
            tokens=sum(len(piece.ids) for piece in pieces),
            learned=sum(len(piece.ids) for piece in pieces if piece.learned),
            pieces=tuple(pieces),
            cut=_cut_text(segments, shown),
        )

    def _pieces(self, segments: Sequence[Segment], conversation: Conversation) -> list[Piece]:
        runs = self._encoder.encode([segments])[0]
        roles = _roles(segments, conversation)
        groups = [list(group) for _, group in groupby(roles, key=lambda pair: pair[0].trainable)]
        last = max((i for i, run in enumerate(runs) if run.trainable), default=0)
        pieces: list[Piece] = []
        for number, (run, group) in enumerate(
            zip(runs, [g for g in groups if any(s.text for s, _ in g)], strict=False)
        ):
            learned = run.trainable and (number == last or not self._kind.last_answer_only)
            pieces += self._run_pieces(Run(run.ids, learned), group)
        return pieces

    def _run_pieces(self, run: Run, group: Sequence[tuple[Segment, str]]) -> Iterator[Piece]:
        """The pieces of a run, each with the speaker in whose text it begins."""
        borders: list[tuple[int, str]] = []
        position = 0
        for segment, role in group:
            position += len(segment.text)
            borders.append((position, role))
        position = 0
        for text, ids in whole_texts(self._tokenizer, run.ids):
            role = next((name for end, name in borders if position < end), TEMPLATE)
            special = len(ids) == 1 and ids[0] in self._special
            yield Piece(text, ids, TEMPLATE if special else role, run.trainable, special)
            position += len(text)


def whole_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Text and ids of the shortest runs of tokens that decode to whole characters.

    Each is decoded behind the one before it, because some tokenizers swallow the space at the start of a text.
    """
    before: tuple[int, ...] = ()
    group: tuple[int, ...] = ()
    for position, token in enumerate(ids):
        group = (*group, token)
        head = str(tokenizer.decode(list(before)))
        text = str(tokenizer.decode([*before, *group]))
        if text.endswith("\ufffd") and len(group) < 8 and position + 1 < len(ids):
            continue
        yield text[len(head) :] if text.startswith(head) else str(tokenizer.decode(list(group))), group
        before, group = group, ()


def learned_share(sample: Sample) -> float:
    """Tokens of a sample that carry loss, as a share."""
    return sample.learned / max(1, sample.tokens)


def _roles(segments: Sequence[Segment], conversation: Conversation) -> list[tuple[Segment, str]]:
    """Each segment with its speaker: that of the first message that holds its text and has not been said whole.

    What is learned the assistant said, so an answer that repeats a piece of the question is not taken for the user's.
    """
    current = 0
    messages = conversation.messages
    found = []
    for segment in segments:
        role = TEMPLATE
        if segment.literal and segment.text:
            following = [i for i in range(current, len(messages)) if segment.text in messages[i].text]
            said = [i for i in following if not segment.trainable or messages[i].role == "assistant"]
            if not said:
                found.append((segment, "assistant" if segment.trainable else TEMPLATE))
                continue
            role = messages[said[0]].role
            current = said[0] + (segment.text == messages[said[0]].text)
        elif segment.trainable:
            role = "assistant"
        found.append((segment, role))
    return found


def _raw(row: RawRow, source: str, layout: str, why: str) -> Sample:
    """A row that could not be rendered, as it stands in the file; half characters, which nothing prints, as escapes."""
    texts = (f"{key}: {value}\n".encode("utf-8", "backslashreplace").decode() for key, value in row.values.items())
    values = tuple(Piece(text, (), "raw", False, False) for text in texts)
    return Sample(source, layout, f"left out, {why}", False, 0, 0, values)


def _side_names(rendered: Rendered) -> tuple[str, ...]:
    return ("chosen", "rejected") if len(rendered.conversations) == 2 else ("",)


def _status(found: EncodedRow, config: DataConfig) -> str:
    if not found.sequences:
        return f"left out, {found.dropped} ({found.whole.total:,} tokens, limit {config.sequence_limit:,})"
    if found.trimmed:
        longest = max(found.sequences, key=len)
        learned = int((longest.labels != IGNORE_INDEX).sum())
        return f"trimmed from {found.whole.total:,} to {len(longest):,} tokens; all {learned:,} learned ones kept"
    return "kept"


def _cut_text(segments: Sequence[Segment], shown: Sequence[Segment]) -> str:
    """What trimming took from the user's texts."""
    pairs = zip(segments, shown, strict=True)
    return " … ".join(long.text[: len(long.text) - len(short.text)] for long, short in pairs if long.text != short.text)
