"""Pinned host memory in which activations wait, and the stream on which they travel.

Pinning is slow and torch rounds every piece up to a power of two, so slabs are pinned once and cut into blocks of one
size; what comes back is used again. It is kept for the life of the model: a change of policy pins nothing anew.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from anima.free_memory import free_host_memory

GIB = 2**30
SLAB_BYTES = 512 << 20
"""What is pinned at a time: a power of two, so that torch rounds nothing up."""
BLOCK_BYTES = 64 << 20
"""Large enough that the host issues few copies, small enough that the last one of a layer wastes little."""
ALIGNMENT = 512
"""Bytes between starts of tensors within a block, as on the device."""
HOST_SHARE = 0.8
"""Of the host memory that was free at the start, at most."""
KEPT_SHARE = 0.1
"""Of the same, what stays free whoever takes the rest: less than HOST_SHARE leaves, for slabs of all ranks round up."""


class HostMemory:
    """Blocks to take and to give back."""

    def __init__(self) -> None:
        """Nothing is pinned before the first tensor comes."""
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._at_start = free_host_memory()
        self.refusal: str | None = None
        """Why there was no block when one was last asked for; None if there was."""
        self._slabs: list[Tensor] = []
        self._free: list[Tensor] = []

    @property
    def held_bytes(self) -> int:
        """All that was pinned, used or not."""
        return len(self._slabs) * SLAB_BYTES

    @property
    def used_bytes(self) -> int:
        """Blocks that were taken and are not back."""
        return self.held_bytes - len(self._free) * BLOCK_BYTES

    def take(self) -> Tensor:
        """A block, uint8.

        Raises:
            torch.OutOfMemoryError: another slab would be more than HOST_SHARE allows, or cannot be pinned.
        """
        if not self._free:
            try:
                self._free.extend(reversed(self._new_slab().split(BLOCK_BYTES)))
            except torch.OutOfMemoryError as error:
                self.refusal = str(error)
                raise
        self.refusal = None
        return self._free.pop()

    def take_back(self, blocks: list[Tensor]) -> None:
        """Empty a list of blocks that nobody reads any more from the host.

        Copies on the device may still be on their way. All of them, out and back, run on the one stream of this
        memory, so whatever is copied into a block next comes after them by itself.
        """
        self._free.extend(reversed(blocks))
        blocks.clear()

    def _new_slab(self) -> Tensor:
        held = f"{self.held_bytes / GIB:.1f} GiB"
        if self.held_bytes + SLAB_BYTES > HOST_SHARE * self._at_start.size:
            limit = f"{HOST_SHARE:.0%} of what was free of host memory at the start ({self._at_start})"
            raise torch.OutOfMemoryError(f"activations that wait hold {held}, and may not take more than {limit}")
        now = free_host_memory()  # other ranks on this machine take theirs from the same
        if now.size - SLAB_BYTES < KEPT_SHARE * self._at_start.size:
            raise torch.OutOfMemoryError(f"activations that wait hold {held} of host memory, and it ends: {now}")
        try:
            slab = torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
        except RuntimeError as error:  # what CUDA says when the system lets no more be pinned
            raise torch.OutOfMemoryError(f"no more host memory can be pinned beside {held}") from error
        self._slabs.append(slab)
        return slab

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Copies in here run beside the computation, after all that it was told to do so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def wait(self) -> None:
        """The computation waits for all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def event(self) -> torch.cuda.Event | None:
        """The end of all copies so far; None on a CPU, where they are over."""
        return None if self._stream is None else self._stream.record_event()


class Tape:
    """The blocks of one layer as a row of bytes, tensor after tensor."""

    def __init__(self, memory: HostMemory) -> None:
        """An empty tape, without blocks."""
        self._memory = memory
        self._blocks: list[Tensor] = []
        self._end = 0

    def write(self, values: Tensor) -> list[Tensor]:
        """Copy a contiguous tensor, beside the computation; it must stay as it is until `HostMemory.event`.

        Returns:
            Where it lies: parts of blocks, in order.
        """
        flat = values.view(-1).view(torch.uint8)
        parts = self._reserve(flat.numel())
        with self._memory.copying():
            for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(piece, non_blocking=True)
        return parts

    def read(self, parts: Sequence[Tensor], into: Tensor) -> None:
        """Copy parts into a contiguous tensor, beside the computation; it is there at `HostMemory.event`."""
        flat = into.view(-1).view(torch.uint8)
        with self._memory.copying():
            for part, piece in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                piece.copy_(part, non_blocking=True)

    def release(self) -> None:
        """All has been read, or will not be: the blocks are free for others."""
        self._memory.take_back(self._blocks)

    def _reserve(self, size: int) -> list[Tensor]:
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        end = start + size
        while len(self._blocks) * BLOCK_BYTES < end:
            self._blocks.append(self._memory.take())
        self._end, parts = end, []
        while start < end:
            index, inside = divmod(start, BLOCK_BYTES)
            count = min(BLOCK_BYTES - inside, end - start)
            parts.append(self._blocks[index][inside : inside + count])
            start += count
        return parts
