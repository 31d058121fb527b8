"""Elo ratings as pure functions of arrays: in the order played, and over random orders.

A rating that depends on the order is no property of the models; the spread over orders shows by how much it is not.
Knows no names, no files, no judge.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

CHUNK_BYTES = 256 << 20
"""Memory for the shuffled matches of the orderings that are computed together."""


@dataclass(frozen=True)
class EloScale:
    """K, and the scale on which `base` to the power of `difference / scale` is the odds of winning."""

    k: float = 32.0
    scale: float = 400.0
    base: float = 10.0
    start: float = 1000.0


SEED_SCALE = EloScale()


@dataclass(frozen=True)
class OrderingRatings:
    """Ratings of all models (M,) over random orders of the same matches.

    Attributes:
        mean: Mean over the orders.
        spread: Standard deviation over the orders.
        low: 2.5 % of the orders are lower.
        high: 2.5 % of the orders are higher.
        num_orderings: How many orders.
    """

    mean: Floats
    spread: Floats
    low: Floats
    high: Floats
    num_orderings: int


def sequential_elo(
    first: Indices, second: Indices, score: Floats, start: Floats, scale: EloScale = SEED_SCALE
) -> Floats:
    """Ratings after every match, in the order of the rows (Elo 1978; the update of QLoRA, section 5.2).

    In Python floats on purpose: NumPy's power rounds differently from C's on some processors, and replaying a recorded
    tournament must give its numbers bit for bit.

    Args:
        first: Index of one model (N,).
        second: Index of its opponent (N,).
        score: What `first` scored (N,): 1 won, 0.5 tied, 0 lost.
        start: Ratings before the first match (M,).
        scale: Constants.

    Returns:
        (N, M): row n holds the ratings after match n.
    """
    ratings = [float(value) for value in start]
    history = np.empty((len(first), len(ratings)))
    rows = zip(first.tolist(), second.tolist(), score.tolist(), strict=True)
    for row, (one, other, scored) in enumerate(rows):
        before_one, before_other = ratings[one], ratings[other]
        expected_one = 1 / (1 + scale.base ** ((before_other - before_one) / scale.scale))
        expected_other = 1 / (1 + scale.base ** ((before_one - before_other) / scale.scale))
        ratings[one] += scale.k * (scored - expected_one)
        ratings[other] += scale.k * (1 - scored - expected_other)
        history[row] = ratings
    return history


def elo_over_orderings(
    first: Indices,
    second: Indices,
    score: Floats,
    num_models: int,
    *,
    num_orderings: int = 10_000,
    seed: int = 0,
    scale: EloScale = SEED_SCALE,
    chunk_bytes: int = CHUNK_BYTES,
) -> OrderingRatings:
    """Elo of the same matches in many random orders (QLoRA, section 5.2).

    The loop goes over matches, each step over all orderings of a chunk at once.

    Args:
        first: Index of one model (N,).
        second: Index of its opponent (N,).
        score: What `first` scored (N,): 1, 0.5 or 0.
        num_models: M.
        num_orderings: Number of random orders.
        seed: Of the private generator; chunks of any size give the same orders.
        scale: Constants.
        chunk_bytes: Memory for shuffled matches.
    """
    kinds, kind_of_match = np.unique(
        np.stack([first, second, np.rint(score * 2).astype(np.int64)]), axis=1, return_inverse=True
    )
    kind_of_match = kind_of_match.reshape(-1).astype(np.min_scalar_type(kinds.shape[1]))
    per_ordering = kind_of_match.nbytes * 3  # shuffled, and once more while it is turned round
    chunk = max(1, min(num_orderings, chunk_bytes // max(1, per_ordering)))
    final = np.empty((num_orderings, num_models))
    generators = np.random.default_rng(seed).spawn(num_orderings)
    for begin in range(0, num_orderings, chunk):
        part = generators[begin : begin + chunk]
        shuffled = np.empty((len(part), len(kind_of_match)), dtype=kind_of_match.dtype)
        for row, generator in enumerate(part):
            shuffled[row] = kind_of_match
            generator.shuffle(shuffled[row])
        final[begin : begin + chunk] = _play(np.ascontiguousarray(shuffled.T), kinds, num_models, scale)
    low, high = np.quantile(final, [0.025, 0.975], axis=0)
    return OrderingRatings(final.mean(axis=0), final.std(axis=0), low, high, num_orderings)


def _play(played: NDArray[np.unsignedinteger], kinds: Indices, num_models: int, scale: EloScale) -> Floats:
    """Final ratings (orderings, models) of a chunk.

    Args:
        played: Kind of the n-th match of every ordering (N, orderings).
        kinds: First, second and twice the first's score of every kind of match (3, kinds).
        num_models: M.
        scale: Constants.
    """
    num_orderings = played.shape[1]
    ratings = np.full(num_orderings * num_models, float(scale.start))
    offset = np.arange(num_orderings, dtype=np.intp) * num_models
    first, second, gain = kinds[0].astype(np.intp), kinds[1].astype(np.intp), scale.k * kinds[2] / 2
    exponent = math.log(scale.base) / scale.scale
    index = np.empty(num_orderings, dtype=np.intp)
    one, other = np.empty_like(index), np.empty_like(index)
    rating_one, rating_other, change, gained = (np.empty(num_orderings) for _ in range(4))
    for row in played:
        np.copyto(index, row)
        np.add(first.take(index, out=one, mode="clip"), offset, out=one)
        np.add(second.take(index, out=other, mode="clip"), offset, out=other)
        ratings.take(one, out=rating_one, mode="clip")
        ratings.take(other, out=rating_other, mode="clip")
        # change = K * (score - 1 / (1 + base ** ((other - one) / scale))); what one wins the other loses
        np.subtract(rating_other, rating_one, out=change)
        np.multiply(change, exponent, out=change)
        np.exp(change, out=change)
        np.add(change, 1, out=change)
        np.divide(-scale.k, change, out=change)
        np.add(change, gain.take(index, out=gained, mode="clip"), out=change)
        np.add(rating_one, change, out=rating_one)
        np.subtract(rating_other, change, out=rating_other)
        ratings[one] = rating_one
        ratings[other] = rating_other
    return ratings.reshape(num_orderings, num_models)
