"""Both sides of a pair begin with the same prompt, which is computed once (prefix sharing: Wang and Hegde 2024, arXiv
2410.20305).

In a packed row the chosen side stands as it is. The rejected side begins with the last token of the common prompt: the
state of that token predicts the first one of the answer, so labels are shifted as ever. In attention the rejected side
sees the keys and values of the prompt before it, as the chosen side has computed them: nothing behind the prompt has
touched them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.transfer import send


@dataclass(frozen=True)
class SharedPrompts:
    """What attention needs of a row of T tokens in D documents, some of which see S tokens of their neighbours as well.

    A document of 4 tokens, of which the next one, of 2 tokens, sees the first 2:

        lengths  0, 2                           sources  0 1 2 3 0 1 4 5     cu_seqlens  0, 4, 8
        own      0 1 2 3 6 7                    prompt   0 1                 copies      4 5

    Attributes:
        lengths: For each document, the tokens at the beginning of the document before it that it sees before its own.
        sources: For each key, the token of the row that it belongs to, int64 (T + S,).
        own: For each token of the row, the place of its key in its own document, int64 (T,).
        prompt: Tokens that a second document sees, each once, int64 (S,).
        copies: The places of these keys in that second document, int64 (S,).
        cu_seqlens: Borders of the documents' keys, int32 (D + 1,).
    """

    lengths: tuple[int, ...]
    sources: Tensor
    own: Tensor
    prompt: Tensor
    copies: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str) -> Self:
        """A copy on the device."""
        tensors = (self.sources, self.own, self.prompt, self.copies, self.cu_seqlens)
        return type(self)(self.lengths, *(send(tensor, device) for tensor in tensors))


def shared_tokens(chosen: TokenSequence, rejected: TokenSequence) -> int:
    """Tokens of the rejected side that need not be computed: the longest common beginning in which neither side has a
    scored token, without its last token.
    """
    length = min(len(chosen), len(rejected))
    ends = chosen.input_ids[:length] != rejected.input_ids[:length]
    for side in (chosen, rejected):
        ends = ends | (side.labels[:length] != IGNORE_INDEX)
    common = int(ends.argmax()) if ends.any() else length
    return max(0, common - 1)


def share(document_lengths: Sequence[int], shared: Sequence[int]) -> SharedPrompts | None:
    """How the documents of a row share; None if none does.

    Args:
        document_lengths: Tokens of each document in the row.
        shared: For each document, how many tokens of the document before it it sees; of two neighbours one at most.
    """
    if not any(shared):
        return None
    lengths = np.array(document_lengths)
    extra = np.array(shared)
    starts = np.cumsum(lengths) - lengths
    borders = np.concatenate([[0], np.cumsum(lengths + extra)])
    sources, copies = [], []
    for i, (length, seen) in enumerate(zip(document_lengths, shared, strict=True)):
        before = starts[i] - (document_lengths[i - 1] if seen else 0)
        sources += [np.arange(before, before + seen), np.arange(starts[i], starts[i] + length)]
        copies.append(np.arange(borders[i], borders[i] + seen))
    joined, copied = np.concatenate(sources), np.concatenate(copies)
    own = np.delete(np.arange(len(joined)), copied)
    return SharedPrompts(
        lengths=tuple(int(seen) for seen in shared),
        sources=torch.from_numpy(joined.astype(np.int64)),
        own=torch.from_numpy(own.astype(np.int64)),
        prompt=torch.from_numpy(joined[copied].astype(np.int64)),
        copies=torch.from_numpy(copied.astype(np.int64)),
        cu_seqlens=torch.from_numpy(borders.astype(np.int32)),
    )
