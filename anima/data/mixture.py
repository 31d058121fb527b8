"""Several files in one training set, each with a weight: how often its rows occur in an epoch.

A weight of 2 is each row twice; 0.5 is a half of the rows, chosen by the seed, the same in every epoch; 1.5 is all
rows once and a half of them twice. Knows sequences by number only.
"""

from collections.abc import Sequence

import numpy as np

from anima.data.kinds import Dataset
from anima.data.order import IndexArray, shuffled
from anima.data.sources import Source
from anima.errors import DataError

MIXTURE = 3
"""Purpose of the seeded order that chooses the rows of a fraction."""


def mix(dataset: Dataset, sources: Sequence[Source], seed: int) -> tuple[Dataset, tuple[str, ...]]:
    """The set with each row as often as its file's weight says, and a line about each file.

    Args:
        dataset: Sequences or pairs that know the number of their file.
        sources: The files by number.
        seed: Decides which rows a fraction holds.

    Raises:
        DataError: A weight is so small that no row of its file would be used.
    """
    if all(source.weight == 1 for source in sources):
        return dataset, ()
    files = dataset.files
    parts: list[IndexArray] = []
    lines = []
    for number, source in enumerate(sources):
        rows = np.flatnonzero(files == number)
        chosen = repeated(rows, source.weight, seed, number)
        if len(chosen) == 0 and len(rows) > 0:
            raise DataError(
                "the weight leaves no row of the file",
                where="--train_files",
                got=f"{source.name}:{source.weight:g} of {len(rows)}",
                allowed=f"more than {0.5 / len(rows):.2g}",
                fix="leave the file out, or raise its weight",
            )
        parts.append(chosen)
        lines.append(f"{source.name} x {source.weight:g}: {len(chosen):,} of {len(rows):,} an epoch")
    return dataset.select(np.concatenate(parts)), tuple(lines)


def repeated(rows: IndexArray, weight: float, seed: int, number: int) -> IndexArray:
    """The rows, each floor(weight) times, and one time more for the seeded fraction; in order."""
    times = np.full(len(rows), int(weight))
    extra = int((weight - int(weight)) * len(rows) + 0.5)
    times[shuffled(len(rows), seed, MIXTURE, number)[:extra]] += 1
    return np.repeat(rows, times)
