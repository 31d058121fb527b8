"""Which examples each optimizer step holds, and this rank's micro-batches of them. A step is a function of (seed,
number of the step), so resuming is starting at that number. Ranks arrive as plain integers.

An example is what `global_batch_size` counts and what stays together: a sequence, or a pair of them.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import numpy as np

from anima.data.batching import assign
from anima.data.order import IndexArray, shuffled

EPOCH_ORDER = 2
"""Purpose of the seeded order of an epoch."""

SEQUENCES_TO_PACK = 100_000
"""How many sequences are packed beforehand to find the heaviest micro-batch; some seconds."""


class Scored(Protocol):
    """A packed row that knows how much of it carries loss."""

    @property
    def num_scored(self) -> int:
        """Labels that carry loss after the shift."""
        ...


Batch = TypeVar("Batch", covariant=True, bound=Scored)


class Examples(Protocol[Batch]):
    """A set as the loaders need it: a TokenizedDataset, or a PairDataset."""

    lengths: IndexArray
    """Tokens to compute of each example, int64 of shape (len,)."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def batch(self, indices: Sequence[int] | IndexArray) -> Batch:
        """The examples of these numbers in one packed row."""
        ...

    def filler(self) -> Batch:
        """A row without loss, for a rank that has nothing to do."""
        ...

    def source(self, index: int) -> str:
        """Where the example comes from, as `file:line`."""
        ...


class StepLoader(Generic[Batch]):
    """The steps of a run.

    All epochs' orders, one behind the other, make an endless stream; step s holds its positions
    [s * global_batch_size, (s + 1) * global_batch_size), and so may reach from one epoch into the next. A thread
    prepares the step behind the one that was asked for, so that the device does not wait.

    Args:
        dataset: The training set.
        global_batch_size: Examples of a step over all ranks.
        micro_batch_tokens: Tokens of a micro-batch, at most.
        packing: Several sequences in a micro-batch.
        seed: Decides the order.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: The dataset is empty.
    """

    def __init__(
        self,
        dataset: Examples[Batch],
        *,
        global_batch_size: int,
        micro_batch_tokens: int,
        packing: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("a training set without sequences")
        self._dataset = dataset
        self._batch_size = global_batch_size
        self._budget = micro_batch_tokens
        self._packing = packing
        self._rank = rank
        self._world_size = world_size
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[tuple[int, float | None], Future[list[Batch]]] | None = None
        self._order = lru_cache(maxsize=2)(lambda epoch: shuffled(len(dataset), seed, EPOCH_ORDER, epoch))

    def num_steps(self, num_train_epochs: float) -> int:
        """Steps until every row was seen `num_train_epochs` times; the last one may be smaller."""
        return math.ceil(self._end(num_train_epochs) / self._batch_size)

    def step(self, index: int, *, num_train_epochs: float | None = None) -> list[Batch]:
        """This rank's micro-batches of step `index`, counted from 0; every rank has as many.

        Args:
            index: Number of the step.
            num_train_epochs: Where the stream ends, which cuts the last step; None: it does not end.

        Raises:
            IndexError: The stream ends before this step.
        """
        wanted, ahead = (index, num_train_epochs), self._ahead
        found = ahead[1].result() if ahead and ahead[0] == wanted else self._prepare(*wanted)
        following = (index + 1, num_train_epochs)
        self._ahead = following, self._thread.submit(self._prepare, *following)  # behind the last, nobody looks at it
        return found

    def _prepare(self, index: int, num_train_epochs: float | None) -> list[Batch]:
        rows = self.rows(index, num_train_epochs=num_train_epochs)
        lengths = self._dataset.lengths[rows]
        shares = assign(
            lengths.tolist(), world_size=self._world_size, micro_batch_tokens=self._budget, packing=self._packing
        )
        return [
            self._dataset.batch(rows[members]) if members else self._dataset.filler() for members in shares[self._rank]
        ]

    def rows(self, index: int, *, num_train_epochs: float | None = None) -> IndexArray:
        """Numbers of the examples of step `index` over all ranks, in the order of the stream.

        Raises:
            IndexError: The stream ends before this step.
        """
        start, stop = index * self._batch_size, (index + 1) * self._batch_size
        if num_train_epochs is not None:
            stop = min(stop, self._end(num_train_epochs))
        if index < 0 or start >= stop:
            raise IndexError(f"no step {index} in {num_train_epochs} epochs")
        epochs, places = np.divmod(np.arange(start, stop), len(self._dataset))
        return np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def heaviest(self, num_steps: int, *, num_train_epochs: float | None = None) -> Batch:
        """The micro-batch with the most tokens of all ranks in steps [0, num_steps); the same on every rank.

        Packing every step of a long run beforehand would take minutes: beyond 100,000 sequences it is the longest
        sequences that fit into the budget together, which is at least as large.
        """
        lengths = self._dataset.lengths
        if num_steps * self._batch_size > SEQUENCES_TO_PACK:
            longest_first = np.argsort(-lengths, kind="stable")
            loads = np.cumsum(lengths[longest_first])
            count = int(np.searchsorted(loads, self._budget, side="right")) if self._packing else 1
            return self._dataset.batch(longest_first[: max(1, count)])
        heaviest, most = [int(lengths.argmax())], 0
        for index in range(num_steps):
            rows = self.rows(index, num_train_epochs=num_train_epochs)
            shares = assign(
                lengths[rows].tolist(),
                world_size=self._world_size,
                micro_batch_tokens=self._budget,
                packing=self._packing,
            )
            for members in (members for share in shares for members in share):
                if (load := int(lengths[rows[members]].sum())) > most:
                    heaviest, most = [int(rows[i]) for i in members], load
        return self._dataset.batch(heaviest)

    def probe(self) -> Batch:
        """The first sequence of the set that carries loss, alone: the same for any ranks, budget and seed."""
        for i in range(len(self._dataset)):
            batch = self._dataset.batch([i])
            if batch.num_scored:
                return batch
        raise ValueError("nothing in the training set carries loss")

    def sources(self, index: int, *, num_train_epochs: float | None = None) -> list[str]:
        """Where the rows of step `index` come from, as `file:line`, for error reports."""
        return [self._dataset.source(int(i)) for i in self.rows(index, num_train_epochs=num_train_epochs)]

    def epoch(self, index: int) -> float:
        """Passes over the training set that lie behind when step `index` begins."""
        return index * self._batch_size / len(self._dataset)

    def _end(self, num_train_epochs: float) -> int:
        """Positions of the stream in so many epochs: whole rows, at least one."""
        return max(1, round(num_train_epochs * len(self._dataset)))


class EvalLoader(Generic[Batch]):
    """All examples of a set once, in order, shared out over the ranks in equal numbers of micro-batches.

    Args:
        dataset: The held-out set.
        micro_batch_tokens: Tokens of a micro-batch, at most.
        packing: Several sequences in a micro-batch.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ValueError: The dataset is empty, or a sequence is longer than a micro-batch.
    """

    def __init__(
        self, dataset: Examples[Batch], *, micro_batch_tokens: int, packing: bool, rank: int, world_size: int
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("a held-out set without sequences")
        if int(dataset.lengths.max()) > micro_batch_tokens:
            raise ValueError(f"a sequence is longer than a micro-batch of {micro_batch_tokens} tokens")
        self._dataset = dataset
        groups = _in_order(dataset.lengths.tolist(), micro_batch_tokens if packing else 0)
        groups += [[] for _ in range(-len(groups) % world_size)]
        self._groups = groups[rank::world_size]

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Batch]:
        for members in self._groups:
            yield self._dataset.batch(members) if members else self._dataset.filler()


def _in_order(lengths: list[int], budget: int) -> list[list[int]]:
    """Neighbouring sequences together as long as they fit into the budget; one at least."""
    groups: list[list[int]] = []
    load = 0
    for i, length in enumerate(lengths):
        if groups and load + length <= budget:
            groups[-1].append(i)
            load += length
        else:
            groups.append([i])
            load = length
    return groups
