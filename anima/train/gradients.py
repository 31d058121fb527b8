"""A step's gradients as ZeRO-2 shares them out: one fp32 vector, summed over micro-batches, reduced once.

DeepSpeed's own reduction copies every parameter's gradient into a bucket, from there into the rank's partition, and
back: thousands of small kernels for the hundreds of matrices of an adapter, and an all-reduce of which each rank keeps
a part. Here autograd adds into views of one vector that lies in the order of DeepSpeed's partitions, so that a single
reduce-scatter (half the bytes) leaves each rank what its part of the optimizer needs. Works on the names of DeepSpeed
0.19 (runtime/zero/stage_1_and_2.py); knows no model.
"""

from typing import Any

import torch
from torch import Tensor

from anima import distributed
from anima.distributed import Ranks

_PIECE = 1 << 25
"""Gradients that DeepSpeed's norm turns into fp64 at a time: 256 MiB."""


class _Partition(list[Tensor]):
    """A rank's part in pieces, for overflow and norm, and as a whole, for the optimizer."""

    def __init__(self, whole: Tensor, pieces: int) -> None:
        super().__init__(whole.split(max(_PIECE, -(-whole.numel() // pieces))))
        self.flat_partition = whole


class Gradients:
    """The gradients of all parameters that an optimizer of DeepSpeed shards.

    Their memory, 4 bytes a parameter on every rank, is held from the beginning.

    Args:
        zero: DeepSpeed's ZeRO-2 optimizer.
        ranks: This process among the others.
        travel: Number format between the ranks.
    """

    def __init__(self, zero: Any, ranks: Ranks, travel: torch.dtype) -> None:  # noqa: ANN401  (deepspeed is untyped)
        self._zero, self._ranks, self._travel = zero, ranks, travel
        self._vectors = [torch.zeros_like(flat, dtype=torch.float32) for flat in zero.bit16_groups_flat]
        self._views = [
            (parameter, _view_at_its_place(vector, parameter, flat))
            for vector, flat, group in zip(self._vectors, zero.bit16_groups_flat, zero.bit16_groups, strict=True)
            for parameter in group
        ]
        self._begun = False
        for hook in zero._grad_acc_hooks:  # one a parameter and backward pass, which finds that it has nothing to do
            hook.remove()
        zero._grad_acc_hooks.clear()

    def begin(self) -> None:
        """Zeros, and every parameter's gradient a view of them: autograd adds in place."""
        for vector in self._vectors:
            vector.zero_()
        for parameter, view in self._views:
            parameter.grad = view
        self._begun = True

    def spoil(self) -> None:
        """Make all of them NaN: then DeepSpeed itself skips the step."""
        for vector in self._vectors:
            vector.fill_(float("nan"))

    def drop(self) -> None:
        """End the step; nothing travels."""
        for parameter, _ in self._views:
            parameter.grad = None
        self._begun = False

    def reduce(self) -> None:
        """Leave DeepSpeed the mean over ranks of this rank's part. A collective, unless the step was dropped."""
        if not self._begun:
            return
        self.drop()
        for number, vector in enumerate(self._vectors):
            mine = distributed.mean_scattered(vector, self._ranks, self._travel)
            pieces = max(1, len(self._zero.params_in_partition[number]))  # the norm pairs pieces with parameters
            self._zero.averaged_gradients[number] = _Partition(mine, pieces)


def _view_at_its_place(vector: Tensor, parameter: Tensor, flat: Tensor) -> Tensor:
    """The part of `vector` that lies as `parameter` lies in `flat`."""
    offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
    return vector[offset : offset + parameter.numel()].view(parameter.shape)
