"""Seeded orders that are the same on every machine and in every version of numpy. Knows nothing of data."""

import numpy as np
import numpy.typing as npt

IndexArray = npt.NDArray[np.int64]


def shuffled(count: int, *key: int) -> IndexArray:
    """A permutation of 0..count-1, shape (count,), decided by the key alone.

    It sorts the raw words of PCG64, whose stream numpy guarantees; the stream of Generator.permutation it does not.

    Args:
        count: Number of items.
        key: Whole numbers >= 0, such as seed, purpose and epoch.
    """
    # The length is part of the key because SeedSequence fills up with zeros: (1, 2) would be (1, 2, 0).
    words = np.random.PCG64(np.random.SeedSequence([len(key), *key])).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
