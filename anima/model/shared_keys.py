"""Keys and values that a second document of the row sees as well: gathered before attention, their gradients added."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor


class SharedKeys(Protocol):
    """How the documents of a row of T tokens share S of them; a token is seen by one other document at most."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of the document before it that each document sees before its own, on the host."""
        ...

    @property
    def sources(self) -> Tensor:
        """The token of each key, int64 (T + S,)."""
        ...

    @property
    def own(self) -> Tensor:
        """The key of each token in its own document, int64 (T,)."""
        ...

    @property
    def prompt(self) -> Tensor:
        """The tokens that are seen twice, int64 (S,)."""
        ...

    @property
    def copies(self) -> Tensor:
        """Their keys in the second document, int64 (S,)."""
        ...

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (documents + 1,), cumulative numbers of keys."""
        ...


def with_shared(states: Tensor, shared: SharedKeys) -> Tensor:
    """Keys or values (1, heads, T, head_dim) of the row's tokens as each document sees them, (1, heads, T + S, …)."""
    return cast(Tensor, _Gather.apply(states, shared))  # type: ignore[no-untyped-call]


class _Gather(torch.autograd.Function):
    """Not index_select alone: its backward pass adds in any order and, in bf16, rounds after every addition."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, shared: SharedKeys) -> Tensor:  # noqa: ANN401
        # Not saved for backward: places in the row are the batch's, and nothing to send to host memory.
        ctx.shared = shared
        return states.transpose(1, 2).index_select(1, shared.sources).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Each token's two gradients are added in fp32 and rounded once; no place is written twice."""
        shared: SharedKeys = ctx.shared
        gradient = gradient.transpose(1, 2)
        total = gradient.index_select(1, shared.own)
        second = gradient.index_select(1, shared.copies)
        total.index_copy_(1, shared.prompt, total.index_select(1, shared.prompt) + second)
        return total.transpose(1, 2), None
