"""Preference pairs over tokenised sequences: rows 2p and 2p + 1 are the chosen and the rejected side of pair p.

The reference's log-probabilities travel with the pairs; who computed them is unknown here.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from anima.data.batching import PairMicroBatch, collate_pairs, pair_filler
from anima.data.dataset import TokenizedDataset
from anima.data.encode import TokenSequence
from anima.data.order import IndexArray

LogpsArray = npt.NDArray[np.float32]


class PairDataset:
    """Pairs by number, without reading the others.

    Args:
        sequences: Chosen and rejected sides in turn.
        reference_logps: Log-probabilities of both answers under the reference, (pairs, 2); NaN where unknown.

    Attributes:
        lengths: Tokens to compute of each pair, the shared prompt once, int64 of shape (len,).
        fingerprint: Changes when a pair or the order does.
    """

    def __init__(self, sequences: TokenizedDataset, reference_logps: LogpsArray | None = None) -> None:
        self._sequences = sequences
        self._reference_logps = reference_logps
        # Both sides have the same prompt (`anima/data/limits.py`), so how long it is tells what they share.
        shared = np.maximum(sequences.given.reshape(-1, 2).min(axis=1) - 1, 0)
        self.lengths: IndexArray = sequences.lengths.reshape(-1, 2).sum(axis=1) - shared
        self.fingerprint = sequences.fingerprint

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[TokenSequence, TokenSequence]:
        return self._sequences[2 * index], self._sequences[2 * index + 1]

    def source(self, index: int) -> str:
        """Where the pair comes from, as `file:line`."""
        return self._sequences.source(2 * index)

    @property
    def files(self) -> npt.NDArray[np.int32]:
        """The number of the data file of each pair, int32 of shape (len,)."""
        return self._sequences.files[::2]

    def select(self, indices: Sequence[int] | IndexArray) -> "PairDataset":
        """The pairs of these numbers, in this order; nothing is copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = np.stack([2 * chosen, 2 * chosen + 1], axis=1).ravel()
        known = self._reference_logps
        return PairDataset(self._sequences.select(rows), None if known is None else known[chosen])

    def with_reference(self, logps: LogpsArray) -> "PairDataset":
        """The same pairs with the reference's log-probabilities, (pairs, 2), chosen first."""
        if logps.shape != (len(self), 2):
            raise ValueError(f"log-probabilities of shape {logps.shape} for {len(self)} pairs")
        return PairDataset(self._sequences, logps)

    def batch(self, indices: Sequence[int] | IndexArray) -> PairMicroBatch:
        """The pairs of these numbers in one packed row.

        Raises:
            ValueError: A reference is attached, but not known for one of these pairs.
        """
        numbers = [int(i) for i in indices]
        reference = None
        if self._reference_logps is not None:
            part = self._reference_logps[numbers]
            if not np.isfinite(part).all():
                raise ValueError(f"the reference is unknown for some of the pairs {numbers}")
            reference = torch.from_numpy(part)
        return collate_pairs([self[i] for i in numbers], reference)

    def filler(self) -> PairMicroBatch:
        """A row without pairs, for a rank that has nothing to do."""
        return pair_filler(self._sequences[0], with_reference=self._reference_logps is not None)

    def chosen_longer(self) -> tuple[float, float]:
        """Shares of the pairs whose chosen answer is the longer one, and whose answers are equally long, in tokens.

        The prompts are the same, so the lengths of the sequences tell.
        """
        difference = np.diff(self._sequences.lengths.reshape(-1, 2), axis=1)
        return float((difference < 0).mean()), float((difference == 0).mean())

    def longer_wins(self) -> float:
        """Accuracy of a judge that knows nothing but length: the longer answer is the better one; ties count half."""
        longer, equal = self.chosen_longer()
        return longer + equal / 2
