"""Text in segments to token ids and labels; what is given and what is learned are tokenised apart.

So training sees exactly the prompt ids that chat sees. Defines IGNORE_INDEX; labels are not shifted here.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from anima.data.segments import Segment
from anima.data.tokenizer import Tokenizer, special_tokens, tokenize
from anima.errors import ModelError

IGNORE_INDEX = -100
"""Label of a token that carries no loss."""

IdArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Ids and labels of one sequence, both of shape (T,); labels[t] is input_ids[t] or IGNORE_INDEX, unshifted."""

    input_ids: IdArray
    labels: IdArray

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Run:
    """The ids of neighbouring segments that are all learned, or all given."""

    ids: list[int]
    trainable: bool


@dataclass(frozen=True, slots=True)
class _Piece:
    """A text for one call of the tokenizer."""

    text: str
    literal: bool
    opens: bool
    """Whether it stands at the start of the sequence."""


_ANCHORS = ("\n", ".", "a", "0")


class Encoder:
    """Segments to ids, in batches.

    A run is tokenised as one text, as inference would do it. Two things need care:

    - A segment from the data that spells out a special token (`<|im_end|>`) is tokenised by itself with special
      tokens split into characters, so that no user can end a turn.
    - SentencePiece tokenizers put a space before every text ("dummy prefix"). In the middle of a sequence that would
      be a second space, so there the text is read behind an anchor whose ids are cut off again.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        eos = [] if tokenizer.eos_token is None else [tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))]
        self._special_ids = frozenset([*special_tokens(tokenizer).values(), *eos])
        spellings = sorted(special_tokens(tokenizer), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, spellings))) if spellings else None
        self._anchors = _needed_anchors(tokenizer)

    def is_stop(self, token_id: int) -> bool:
        """Whether the token is a control token, such as ends an answer."""
        return token_id in self._special_ids

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[list[Run]]:
        """The runs of each row, in order; runs without ids are left out."""
        pieces: list[_Piece] = []
        owners: list[tuple[int, bool, int]] = []
        for row, segments in enumerate(rows):
            runs = groupby((s for s in segments if s.text), key=lambda segment: segment.trainable)
            for number, (trainable, run) in enumerate(runs):
                for piece in self._pieces(list(run), opens=number == 0):
                    pieces.append(piece)
                    owners.append((row, trainable, number))
        encoded: list[list[Run]] = [[] for _ in rows]
        paired = zip(owners, self._ids(pieces), strict=True)
        for (row, trainable, _), group in groupby(paired, key=lambda pair: pair[0]):
            ids = [i for _, part in group for i in part]
            if ids:
                encoded[row].append(Run(ids, trainable))
        return encoded

    def prompt_ids(self, segments: Sequence[Segment]) -> list[int]:
        """The ids of a prompt, the same ones that training put before its answer."""
        return [i for run in self.encode([segments])[0] for i in run.ids]

    def _pieces(self, run: list[Segment], opens: bool) -> list[_Piece]:
        """The run as one text, but for those segments of the data that spell out a special token."""
        pieces: list[_Piece] = []
        for guarded, group in groupby(run, key=self._spells_special):
            text = "".join(segment.text for segment in group)
            pieces.append(_Piece(text, literal=guarded, opens=opens and not pieces))
        return pieces

    def _spells_special(self, segment: Segment) -> bool:
        return segment.literal and self._special is not None and self._special.search(segment.text) is not None

    def _ids(self, pieces: list[_Piece]) -> list[list[int]]:
        ids: list[list[int]] = [[] for _ in pieces]
        for literal in (False, True):
            chosen = [i for i, piece in enumerate(pieces) if piece.literal == literal]
            anchored = [bool(self._anchors) and not pieces[i].opens for i in chosen]
            anchor = self._anchors[0][0] if self._anchors else ""
            texts = [anchor * held + pieces[i].text for i, held in zip(chosen, anchored, strict=True)]
            tokenized = tokenize(self._tokenizer, texts, split_special=literal)
            for i, held, found in zip(chosen, anchored, tokenized, strict=True):
                ids[i] = self._without_anchor(pieces[i], found) if held else found
        return ids

    def _without_anchor(self, piece: _Piece, found: list[int]) -> list[int]:
        """Cut the first anchor's ids off; where it grew together with the text, try the other anchors."""
        for anchor, head in self._anchors:
            if anchor != self._anchors[0][0]:
                found = tokenize(self._tokenizer, [anchor + piece.text], split_special=piece.literal)[0]
            if found[: len(head)] == head:
                return found[len(head) :]
        what = "the tokenizer joins every known anchor with the text behind it"
        raise ModelError(what, where="tokenizer", got=repr(piece.text[:40]))


def _needed_anchors(tokenizer: Tokenizer) -> list[tuple[str, list[int]]]:
    """Anchors with their ids, for a tokenizer that puts something before every text; none for others."""
    heads = tokenize(tokenizer, list(_ANCHORS))
    anchors = list(zip(_ANCHORS, heads, strict=True))
    probes = [f"{anchor}b" for anchor in _ANCHORS]
    alone = tokenize(tokenizer, ["b"])[0]
    for (_, head), found in zip(anchors, tokenize(tokenizer, probes), strict=True):
        if found[: len(head)] == head:
            return [] if found[len(head) :] == alone else anchors
    return []


def to_sequence(runs: Sequence[Run], *, train_on_all: bool) -> TokenSequence:
    """One sequence from its runs; labels by the length of the runs, never by the value of a token."""
    input_ids = np.array([i for run in runs for i in run.ids], dtype=np.int32)
    labels = input_ids.copy()
    position = 0
    for run in runs:
        if not run.trainable and not train_on_all:
            labels[position : position + len(run.ids)] = IGNORE_INDEX
        position += len(run.ids)
    return TokenSequence(input_ids, labels)
