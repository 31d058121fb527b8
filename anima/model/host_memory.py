"""Pinned host memory in which activations wait, and the stream on which they travel.

Pinning is slow and torch rounds every piece up to a power of two, so slabs are pinned once and cut into blocks of one
size; what comes back is used again. It is kept for the life of the model: a change of policy pins nothing anew.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

SLAB_BYTES = 512 << 20
"""What is pinned at a time: a power of two, so that torch rounds nothing up."""
BLOCK_BYTES = 64 << 20
"""Large enough that the host issues few copies, small enough that the last one of a layer wastes little."""
ALIGNMENT = 512
"""Bytes between starts of tensors within a block, as on the device."""
HOST_SHARE = 0.8
"""Of the host memory that was free at the start, at most."""


class HostMemory:
    """Blocks to take and to give back."""

    def __init__(self) -> None:
        """Nothing is pinned before the first tensor comes."""
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._room = int(HOST_SHARE * psutil.virtual_memory().available)
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
            self._free.extend(reversed(self._new_slab().split(BLOCK_BYTES)))
        return self._free.pop()

    def take_back(self, blocks: list[Tensor]) -> None:
        """Empty a list of blocks that nobody reads any more from the host.

        Copies on the device may still be on their way. All of them, out and back, run on the one stream of this
        memory, so whatever is copied into a block next comes after them by itself.
        """
        self._free.extend(reversed(blocks))
        blocks.clear()

    def _new_slab(self) -> Tensor:
        if self.held_bytes + SLAB_BYTES > self._room:
            raise torch.OutOfMemoryError(
                f"activations that wait in host memory would take more than {self._room / 2**30:.1f} GiB of it"
            )
        try:
            slab = torch.empty(SLAB_BYTES, dtype=torch.uint8, pin_memory=self._stream is not None)
        except RuntimeError as error:  # what CUDA says when the system lets no more be pinned
            held = self.held_bytes / 2**30
            raise torch.OutOfMemoryError(f"no more host memory can be pinned beside {held:.1f} GiB") from error
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
