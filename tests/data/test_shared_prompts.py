"""What the sides of a pair share, worked out by hand."""

import numpy as np
import pytest
import torch

from anima.data.batching import collate_pairs
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.shared_prompts import share, shared_tokens

_ = IGNORE_INDEX


def side(ids: list[int], labels: list[int]) -> TokenSequence:
    return TokenSequence(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32))


CHOSEN = side([5, 6, 7, 8, 9], [_, _, _, 8, 9])
REJECTED = side([5, 6, 7, 4], [_, _, _, 4])


def test_a_row_of_two_pairs_by_hand() -> None:
    batch = collate_pairs([(CHOSEN, REJECTED), (side([3, 1], [_, 1]), side([3, 2, 2], [_, 2, 2]))])
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 9, 7, 4, 3, 1, 3, 2, 2]
    assert batch.labels[0].tolist() == [_, _, _, 8, 9, _, 4, _, 1, _, 2, 2]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 2]
    assert batch.document_lengths == (5, 2, 2, 3)
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 9, 12]
    assert batch.answer_tokens.tolist() == [2, 1, 1, 2]
    assert (batch.num_scored, batch.num_tokens, batch.num_examples) == (6, 14, 2)
    shared = batch.shared_prompts
    assert shared is not None
    assert shared.lengths == (0, 2, 0, 0)  # a prompt of one token is repeated as it is
    assert shared.sources.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10, 11]
    assert shared.cu_seqlens.tolist() == [0, 5, 9, 11, 14]
    assert shared.own.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    assert (shared.prompt.tolist(), shared.copies.tolist()) == ([0, 1], [5, 6])
    assert shared.cu_seqlens.dtype == torch.int32
    moved = batch.to("meta").shared_prompts
    assert moved is not None
    assert {moved.sources.device.type, moved.own.device.type, moved.cu_seqlens.device.type} == {"meta"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (CHOSEN, REJECTED, 2),
        (CHOSEN, side([1, 6, 7, 4], [_, _, _, 4]), 0),  # nothing in common
        (CHOSEN, side([5, 6, 1, 4], [_, _, _, 4]), 1),  # the end of the prompt differs
        (CHOSEN, side([5, 6, 7, 8, 4], [_, _, _, 8, 4]), 2),  # the answers begin alike, but are scored
        (CHOSEN, side([5, 6, 7], [_, 6, 7]), 0),  # a prompt that is scored on one side
        (side([5, 6], [5, 6]), side([5, 6], [5, 6]), 0),
        (side([5], [5]), side([4], [4]), 0),  # sides of one token
        (side([5, 6], [_, _]), side([5, 6], [_, _]), 1),  # nothing scored: the last token stays
    ],
)
def test_what_two_sides_share(chosen: TokenSequence, rejected: TokenSequence, expected: int) -> None:
    assert shared_tokens(chosen, rejected) == shared_tokens(rejected, chosen) == expected


def test_rows_in_which_nothing_is_shared_say_so() -> None:
    assert share([3, 4], [0, 0]) is None
    assert collate_pairs([(side([5], [5]), side([4, 3], [4, 3]))]).shared_prompts is None
