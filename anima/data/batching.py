"""The sequences of one optimizer step, packed into micro-batches of a token budget and balanced over ranks.

Pure functions of lengths and sequences; knows neither where sequences come from nor which rank it is on.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np
import torch

from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.shared_prompts import SharedPrompts, share, shared_tokens
from anima.transfer import send

FILLER_TOKENS = 16
"""Longest filler: long enough to be an ordinary pass, short enough to cost nothing."""


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences ("documents") in one row, which attention keeps apart.

    Two documents of 3 and 4 tokens, of which the last two and three are supervised:

        input_ids         a   b   c   d   e   f   g         (1, T)
        labels         -100   b   c -100   e   f   g        (1, T), unshifted
        position_ids      0   1   2   0   1   2   3         (1, T), restarts with each document
        document_lengths  3, 4         cu_seqlens  0, 3, 7   max_seqlen 4   num_scored 5

    A document's first label is always IGNORE_INDEX: after the shift it would be predicted from the document before.
    With `shared_prompts` a document may see the beginning of the one before it; then its positions go on from there.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_lengths: tuple[int, ...]
    shared_prompts: SharedPrompts | None = field(default=None, kw_only=True)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Borders of the documents, int32 of shape (documents + 1,), on the device of the ids."""
        return send(torch.tensor(np.cumsum([0, *self.document_lengths]), dtype=torch.int32), self.input_ids.device)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.document_lengths)

    @cached_property
    def num_scored(self) -> int:
        """Labels that carry loss after the shift; 0 for a filler."""
        return int((self.labels != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences as data: what two of them share counts for both, though it is computed once."""
        return sum(self.document_lengths) + sum(self.shared_prompts.lengths if self.shared_prompts else ())

    @property
    def num_examples(self) -> int:
        """What `global_batch_size` counts: sequences here."""
        return len(self.document_lengths)

    def to(self, device: torch.device | str) -> Self:
        """What the network reads, on the device; the labels stay, since who chooses by them there has to wait."""
        shared = self.shared_prompts
        moved = replace(
            self,
            input_ids=send(self.input_ids, device),
            position_ids=send(self.position_ids, device),
            shared_prompts=None if shared is None else shared.to(device),
        )
        vars(moved)["cu_seqlens"] = send(self.cu_seqlens, device)
        return moved


@dataclass(frozen=True)
class PairMicroBatch(MicroBatch):
    """Pairs in one row: documents 2p and 2p + 1 are the chosen and the rejected side of its pair p.

    The prompt they share is computed once: of the rejected side only its last token is repeated.

    answer_tokens: scored tokens of each document, int64 (2 * pairs,); empty in a filler.
    reference_logps: log-probabilities of both answers under the reference, fp32 (pairs, 2); None without one.
    """

    answer_tokens: torch.Tensor
    reference_logps: torch.Tensor | None = None

    @property
    def num_examples(self) -> int:
        """What `global_batch_size` counts: pairs here; 0 for a filler."""
        return self.answer_tokens.numel() // 2

    def to(self, device: torch.device | str) -> Self:
        """What network and loss read, on the device; the labels stay."""
        reference, row = self.reference_logps, super().to(device)
        moved = replace(
            row,
            answer_tokens=send(self.answer_tokens, device),
            reference_logps=None if reference is None else send(reference, device),
        )
        vars(moved)["cu_seqlens"] = row.cu_seqlens
        return moved


def collate(sequences: Sequence[TokenSequence], shared: Sequence[int] = ()) -> MicroBatch:
    """One row of all sequences, one behind the other; nothing is padded.

    Args:
        sequences: What is to be computed of each.
        shared: How many tokens of the sequence before it each goes on from; without, none does.
    """
    lengths = [len(sequence) for sequence in sequences]
    input_ids = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
    labels = np.concatenate([sequence.labels for sequence in sequences]).astype(np.int64)
    starts = np.cumsum([0, *lengths[:-1]])
    labels[starts] = IGNORE_INDEX
    offsets = starts - np.array(shared) if len(shared) else starts
    position_ids = np.arange(len(input_ids), dtype=np.int64) - np.repeat(offsets, lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        document_lengths=tuple(lengths),
        shared_prompts=share(lengths, shared) if len(shared) else None,
    )


def filler(sequence: TokenSequence) -> MicroBatch:
    """A micro-batch without loss, for a rank that has fewer than the others: every rank runs as many passes."""
    input_ids = sequence.input_ids[:FILLER_TOKENS]
    return collate([TokenSequence(input_ids, np.full_like(input_ids, IGNORE_INDEX))])


def collate_pairs(
    pairs: Sequence[tuple[TokenSequence, TokenSequence]], reference_logps: torch.Tensor | None = None
) -> PairMicroBatch:
    """One row of all pairs, the chosen side of each before the rejected one.

    Args:
        pairs: Chosen and rejected side, with the same prompt.
        reference_logps: fp32 (pairs, 2), in the order of the pairs.
    """
    counts = [int(np.count_nonzero(side.labels[1:] != IGNORE_INDEX)) for pair in pairs for side in pair]
    documents, shared = [], []
    for chosen, rejected in pairs:
        known = shared_tokens(chosen, rejected)
        documents += [chosen, TokenSequence(rejected.input_ids[known:], rejected.labels[known:])]
        shared += [0, known]
    return _as_pairs(collate(documents, shared), torch.tensor(counts), reference_logps)


def pair_filler(sequence: TokenSequence, *, with_reference: bool) -> PairMicroBatch:
    """A micro-batch without pairs; `with_reference` as in the batches of the other ranks."""
    empty = torch.zeros(0, 2) if with_reference else None
    return _as_pairs(filler(sequence), torch.zeros(0, dtype=torch.int64), empty)


def _as_pairs(row: MicroBatch, answer_tokens: torch.Tensor, reference_logps: torch.Tensor | None) -> PairMicroBatch:
    return PairMicroBatch(
        input_ids=row.input_ids,
        labels=row.labels,
        position_ids=row.position_ids,
        document_lengths=row.document_lengths,
        shared_prompts=row.shared_prompts,
        answer_tokens=answer_tokens,
        reference_logps=reference_logps,
    )


def assign(lengths: Sequence[int], *, world_size: int, micro_batch_tokens: int, packing: bool) -> list[list[list[int]]]:
    """Share the examples of one step (sequences, or pairs) out: rank -> micro-batch -> numbers of examples.

    Every rank gets the same number of micro-batches, as few as best-fit-decreasing packing gives. Then the sequences
    are spread evenly over these, longest first into the emptiest (LPT), and the micro-batches over the ranks so that
    those that run at the same time are alike and the ranks' sums are too. An empty micro-batch stands for a filler.

    Args:
        lengths: Tokens to compute of each example of the step; a pair counts both sides and stays together.
        world_size: Number of ranks.
        micro_batch_tokens: Tokens of a micro-batch, at most.
        packing: False gives every sequence a micro-batch of its own.

    Raises:
        ValueError: There is no sequence, or one is longer than the budget (the configuration forbids that).
    """
    if len(lengths) == 0:
        raise ValueError("a step without sequences")
    if max(lengths) > micro_batch_tokens:
        raise ValueError(f"a sequence of {max(lengths)} tokens is longer than a micro-batch of {micro_batch_tokens}")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if packing:
        bins = _best_fit(longest_first, lengths, micro_batch_tokens)
        count = -(-len(bins) // world_size) * world_size
        bins = _level(longest_first, lengths, count, micro_batch_tokens) or _spread(bins, count)
    else:
        bins = [[i] for i in longest_first]
        bins += [[] for _ in range(-len(bins) % world_size)]
    return _share(bins, lengths, world_size)


def _best_fit(longest_first: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each sequence into the fullest bin that still holds it, else into a new one."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for i in longest_first:
        fitting = bisect_left(room, (lengths[i], -1))
        if fitting < len(room):
            left, chosen = room.pop(fitting)
        else:
            left, chosen = budget, len(bins)
            bins.append([])
        bins[chosen].append(i)
        insort(room, (left - lengths[i], chosen))
    return bins


def _level(longest_first: Sequence[int], lengths: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """LPT into `count` bins: each sequence into the emptiest; None where that breaks the budget."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for i in longest_first:
        load, emptiest = loads[0]
        if load + lengths[i] > budget:
            return None
        bins[emptiest].append(i)
        heapq.heapreplace(loads, (load + lengths[i], emptiest))
    return bins


def _spread(bins: list[list[int]], count: int) -> list[list[int]]:
    """Fill up to `count` bins by taking single sequences out of bins with several, while there are any."""
    crowded = [full for full in bins if len(full) > 1]
    while len(bins) < count and crowded:
        bins.append([crowded[-1].pop()])
        if len(crowded[-1]) == 1:
            crowded.pop()
    return bins + [[] for _ in range(count - len(bins))]


def _share(bins: list[list[int]], lengths: Sequence[int], world_size: int) -> list[list[list[int]]]:
    """Heaviest bins first, a round of one bin a rank at a time, the heavier to the rank with the smaller sum."""
    loads = [sum(lengths[i] for i in members) for members in bins]
    heaviest_first = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    ranks: list[list[list[int]]] = [[] for _ in range(world_size)]
    sums = [0] * world_size
    for start in range(0, len(bins), world_size):
        lightest_first = sorted(range(world_size), key=lambda rank: (sums[rank], rank))
        for rank, number in zip(lightest_first, heaviest_first[start : start + world_size], strict=True):
            ranks[rank].append(bins[number])
            sums[rank] += loads[number]
    return ranks
