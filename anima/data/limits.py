"""The length limits and what happens to a row over them: drop, trim the user's text, or stop. Answers are never cut.

Turns the segments of a row into TokenSequences, or into the reason why there are none. A row has one rendering, or
two with the same prompt (a preference pair), which then keep the same prompt ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anima.config.schema import DataConfig
from anima.data.encode import Encoder, Run, TokenSequence, to_sequence
from anima.data.segments import Segment
from anima.data.tokenizer import Tokenizer
from anima.errors import DataError, ModelError

TOO_LONG = "longer than max_seq_length"
SOURCE_TOO_LONG = "context longer than source_max_len"
TARGET_TOO_LONG = "answer longer than target_max_len"
STILL_TOO_LONG = "too long even with the user's text trimmed"

_TRIM_ROUNDS = 8
"""Tokens change a little when text is cut, so a trimmed row is measured again; a few rounds always do."""


Renderings = Sequence[Sequence[Segment]]
"""One row: its segments, or those of both sides of a pair."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens before the last answer, of the last answer with its stop token, and of the whole row."""

    source: int
    target: int
    total: int


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """What became of a row: a sequence for each rendering, or the reason for dropping it."""

    sequences: tuple[TokenSequence, ...]
    dropped: str | None
    trimmed: bool
    num_answers: int
    """Learned runs of tokens."""
    num_stopped: int
    """Those whose last token is a stop token."""
    whole: Lengths = Lengths(0, 0, 0)
    """Its lengths before anything was cut or dropped; of a pair, the longer side's."""
    left: tuple[tuple[Segment, ...], ...] | None = None
    """What trimming left of each rendering; None if nothing was trimmed."""


def _last_answer(runs: Sequence[Run]) -> int | None:
    return max((i for i, run in enumerate(runs) if run.trainable), default=None)


def _measure(runs: Sequence[Run]) -> Lengths:
    """Tokens before the last answer, of the last answer, and of all; without an answer told apart, only of all."""
    total = sum(len(run.ids) for run in runs)
    last = _last_answer(runs)
    if last is None:
        return Lengths(0, 0, total)
    return Lengths(sum(len(run.ids) for run in runs[:last]), len(runs[last].ids), total)


def _longest(encoded: Sequence[Sequence[Run]]) -> Lengths:
    """The longest of each over all renderings of a row."""
    found = [_measure(runs) for runs in encoded]
    return Lengths(max(x.source for x in found), max(x.target for x in found), max(x.total for x in found))


class RowEncoder:
    """Encodes rows under the limits and the policy of a DataConfig.

    Args:
        tokenizer: The tokenizer.
        config: Its limits, `truncation` and `train_on` are used.
        last_answer_only: Only the last answer of a conversation is learned, as for preference pairs.

    Raises:
        ModelError: `truncation` is trim_prompt and the tokenizer cannot tell where in the text a token starts.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, *, last_answer_only: bool = False) -> None:
        if config.truncation == "trim_prompt" and not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "the tokenizer does not tell where its tokens start in the text, as trim_prompt needs",
                where="--truncation",
                got="trim_prompt",
                allowed="drop, error",
                fix="use --truncation drop, or a model folder with a tokenizer.json",
            )
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._config = config
        self._last_answer_only = last_answer_only
        self._total = config.sequence_limit
        self._source = min(config.source_max_len or self._total, self._total)
        self._target = min(config.target_max_len or self._total, self._total)

    def encode(self, rows: Sequence[Renderings], sources: Sequence[str]) -> list[EncodedRow]:
        """What became of each row.

        Args:
            rows: The renderings of each row; if there are two, they have the same prompt.
            sources: Where each row comes from, for errors.

        Raises:
            DataError: A row is over a limit and the policy is error, or the two prompts of a pair differ.
        """
        ids = iter(self._encoder.encode([segments for row in rows for segments in row]))
        encoded = [[next(ids) for _ in row] for row in rows]
        return [
            replace(self._fit(row, runs, source), whole=_longest(runs))
            for row, runs, source in zip(rows, encoded, sources, strict=True)
        ]

    def _over(self, lengths: Lengths) -> tuple[str, int, int] | None:
        """The limit that is broken first, with the length and the limit in tokens."""
        if lengths.target > self._target:
            return TARGET_TOO_LONG if self._config.target_max_len else TOO_LONG, lengths.target, self._target
        if lengths.source > self._source:
            return SOURCE_TOO_LONG if self._config.source_max_len else TOO_LONG, lengths.source, self._source
        if lengths.total > self._total:
            return TOO_LONG, lengths.total, self._total
        return None

    def _fit(self, row: Renderings, encoded: list[list[Run]], source: str) -> EncodedRow:
        _check_prompts(encoded, source)
        lengths = _longest(encoded)
        over = self._over(lengths)
        if over is None:
            return self._kept(encoded, trimmed=False)
        reason, length, limit = over
        if self._config.truncation == "error":
            raise DataError(
                f"the row is too long: {reason}",
                where=source,
                got=f"{length} tokens",
                allowed=f"{limit} tokens",
                fix="raise the limit, or use --truncation drop or trim_prompt",
            )
        if self._config.truncation == "drop" or lengths.target > self._target:
            return _dropped(reason)
        return self._trimmed(row, lengths)

    def _kept(self, encoded: Sequence[list[Run]], *, trimmed: bool) -> EncodedRow:
        if self._last_answer_only:
            encoded = [_only_last(runs) for runs in encoded]
        train_on_all = self._config.train_on == "all"
        sequences = tuple(to_sequence(runs, train_on_all=train_on_all) for runs in encoded)
        answers = [run for runs in encoded for run in runs if run.trainable]
        stopped = sum(self._encoder.is_stop(run.ids[-1]) for run in answers)
        return EncodedRow(sequences, None, trimmed, len(answers), stopped)

    def _trimmed(self, row: Renderings, lengths: Lengths) -> EncodedRow:
        """Shorten the user's texts, by the same in every rendering, until all fit, or find that they never will."""
        for _ in range(_TRIM_ROUNDS):
            excess = max(lengths.source - self._source, lengths.total - self._total)
            shorter = [self._shorten(segments, excess) for segments in row]
            if shorter == list(row):
                break
            row = shorter
            encoded = self._encoder.encode(row)
            lengths = _longest(encoded)
            if self._over(lengths) is None:
                return replace(self._kept(encoded, trimmed=True), left=tuple(map(tuple, row)))
        return _dropped(STILL_TOO_LONG)

    def _shorten(self, segments: Sequence[Segment], excess: int) -> list[Segment]:
        """Take `excess` tokens from the starts of the trimmable segments, earliest first; one is left of the last."""
        shorter = list(segments)
        trimmable = [i for i, segment in enumerate(segments) if segment.trimmable]
        for i in trimmable:
            starts = self._token_starts(segments[i].text)
            wanted = min(excess, len(starts) - (i == trimmable[-1]))
            if wanted <= 0:
                continue
            cut = starts[wanted] if wanted < len(starts) else len(segments[i].text)
            if cut == 0:  # the first characters take several tokens each: cut the first one
                cut = next((start for start in starts if start > 0), 0 if i == trimmable[-1] else len(segments[i].text))
            shorter[i] = replace(segments[i], text=segments[i].text[cut:])
            excess -= wanted
        return shorter

    def _token_starts(self, text: str) -> list[int]:
        """Where in the text each of its tokens starts, in characters."""
        encoded = self._tokenizer(
            [text], add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return [int(start) for start, _ in encoded["offset_mapping"][0]]


def _check_prompts(encoded: Sequence[Sequence[Run]], source: str) -> None:
    """The ids before the last answer must be the same in every rendering of a row."""
    prompts = [runs[: _last_answer(runs)] for runs in encoded]
    if any(prompt != prompts[0] for prompt in prompts):
        raise DataError(
            "the template renders the prompt otherwise for the other answer, so the two cannot be compared",
            where=source,
            fix="use --chat_template alpaca, vicuna or guanaco",
        )


def _only_last(runs: Sequence[Run]) -> list[Run]:
    last = _last_answer(runs)
    return [replace(run, trainable=i == last) for i, run in enumerate(runs)]


def _dropped(reason: str) -> EncodedRow:
    return EncodedRow((), reason, trimmed=False, num_answers=0, num_stopped=0)
