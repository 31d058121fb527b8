"""The sequences of bench_sft.py's steps: lengths of the ancestor's data, made-up ids; the same for us and for peers.

It knows nothing of micro-batches' tokens or of trainers.
"""

import math
import random
from collections.abc import Sequence

import numpy as np

from anima.data.encode import IGNORE_INDEX, TokenSequence

LONGEST = 1024


def draw_lengths(count: int, seed: int) -> list[tuple[int, int]]:
    """(source, target) tokens: log-normals through the ancestor's quantiles (.8: 188 and 222, .95: 396 and 491)."""
    generator = random.Random(seed)

    def draw(median: float, sigma: float, low: int) -> int:
        return max(low, min(LONGEST // 2, int(math.exp(generator.gauss(median, sigma)))))

    return [
        (draw(math.log(188) - 0.8416 * 0.9294, 0.9294, 8), draw(math.log(222) - 0.8416 * 0.9905, 0.9905, 4))
        for _ in range(count)
    ]


def step_rows(sequences: int, seed: int) -> list[TokenSequence]:
    """The sequences of one optimizer step; the loss is on the target."""
    generator = np.random.default_rng(seed)
    rows = []
    for source, target in draw_lengths(sequences, seed):
        ids = generator.integers(4, 32000, source + target).astype(np.int32)
        labels = ids.copy()
        labels[:source] = IGNORE_INDEX
        rows.append(TokenSequence(ids, labels))
    return rows


def sorted_within(steps: Sequence[Sequence[TokenSequence]]) -> list[list[TokenSequence]]:
    """Each step's own sequences, longest first: what can be grouped by length without moving any to another step."""
    return [sorted(rows, key=len, reverse=True) for rows in steps]


def grouped_over(steps: Sequence[Sequence[TokenSequence]], micro_batch: int) -> list[list[TokenSequence]]:
    """The sequences of all steps in micro-batches of like length, which are dealt to steps at random.

    As a trainer groups a whole data set by length: least padding, but steps of other sequences than before.
    """
    rows = sorted((row for step in steps for row in step), key=len, reverse=True)
    parts = [rows[i : i + micro_batch] for i in range(0, len(rows), micro_batch)]
    random.Random(0).shuffle(parts)
    a_step = len(parts) // len(steps)
    return [[row for part in parts[i : i + a_step] for row in part] for i in range(0, len(parts), a_step)]
