"""Activations of some layers wait in pinned host memory between the forward and the backward pass.

Copies run on a stream of their own beside the computation: out while the next layers compute, back while the layers
behind are differentiated. Nothing is rounded, so results have the same bits. On a CPU the copies are plain ones, for
tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor, nn

SMALLEST_BYTES = 1 << 20
"""Tensors below this stay where they are."""
HOST_SHARE = 0.8
"""Of the host memory that was free at the start, at most."""


@dataclass
class _Waiting:
    """A tensor that is away."""

    host: Tensor
    back: Tensor | None = None
    arrived: Any = None


@dataclass
class _Layer:
    """What one layer saved, by address; addresses hold while `sources` keeps the tensors alive."""

    before: "_Layer | None"
    kept: frozenset[int]
    places: dict[tuple[int, int, torch.dtype], _Waiting] = field(default_factory=dict)
    sources: list[Tensor] = field(default_factory=list)
    gone: Any = None
    fetched: bool = False

    def finish(self) -> None:
        """Its backward pass is over: let go of everything."""
        self.places.clear()
        self.sources.clear()
        self.before = None


Packed = Tensor | tuple[_Waiting, _Layer, torch.Size]


def spread(first: int, num_layers: int, count: int) -> list[int]:
    """`count` layers of [first, num_layers), evenly; the last of all stays, since it is needed back at once."""
    room = num_layers - first
    count = min(count, room)
    return [first + i * room // count for i in range(count)]


class HostOffload:
    """Sends away what chosen layers save for the backward pass."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Hook the layers, given in the order of the forward pass; `remove` undoes it."""
        self._first = layers[0]
        self._previous: _Layer | None = None
        self._returning: _Layer | None = None
        self._entered: torch.autograd.graph.saved_tensors_hooks | None = None
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self._room = int(HOST_SHARE * psutil.virtual_memory().available)
        self._taken = 0
        self._handles = []
        for layer in layers:
            self._handles.append(layer.register_forward_pre_hook(self._enter))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """The layers keep their tensors again."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: object) -> None:
        if not (torch.is_grad_enabled() and module.training):
            return
        if module is self._first:
            self._finish(None)
            self._previous, self._taken = None, 0
        if self._previous is not None:
            self._let_go(self._previous.before)
        layer = _Layer(self._previous, frozenset(p.data_ptr() for p in module.parameters()))
        self._previous = layer
        self._entered = torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._send(tensor, layer), self._fetch)
        self._entered.__enter__()

    def _leave(self, *_: object) -> None:
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
            self._entered = None
            if self._stream is not None and self._previous is not None:
                self._previous.gone = self._stream.record_event()

    def _finish(self, now: _Layer | None) -> None:
        """The backward pass has come to layer `now`, so the one behind it is through."""
        if self._returning is not None and self._returning is not now:
            self._returning.finish()
        self._returning = now

    def _let_go(self, layer: _Layer | None) -> None:
        """Free the device memory of a layer whose copies the computation has to wait for, if they are not done."""
        if layer is not None:
            if layer.gone is not None:
                torch.cuda.current_stream().wait_event(layer.gone)
            layer.sources.clear()

    def _send(self, tensor: Tensor, layer: _Layer) -> Packed:
        size = tensor.numel() * tensor.element_size()
        if size < SMALLEST_BYTES or not tensor.is_contiguous() or tensor.data_ptr() in layer.kept:
            return tensor
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if key not in layer.places:
            layer.places[key] = _Waiting(self._copy_out(tensor.detach().view(-1), size))
            layer.sources.append(tensor)
        return layer.places[key], layer, tensor.shape

    def _copy_out(self, flat: Tensor, size: int) -> Tensor:
        self._taken += size
        if self._taken > self._room:
            raise torch.OutOfMemoryError(
                f"activations that wait in host memory would take more than {self._room / 2**30:.1f} GiB of it"
            )
        if self._stream is None:
            return flat.clone()
        host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host.copy_(flat, non_blocking=True)
        return host

    def _fetch(self, packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        waiting, layer, shape = packed
        self._finish(layer)
        self._start_fetching(layer)
        self._start_fetching(layer.before)  # beside the computation of this layer
        assert waiting.back is not None
        if waiting.arrived is not None:
            torch.cuda.current_stream().wait_event(waiting.arrived)
        return waiting.back.view(shape)

    def _start_fetching(self, layer: _Layer | None) -> None:
        if layer is None or layer.fetched:
            return
        layer.fetched = True
        if layer.sources:  # the last layers are needed before anybody wanted their memory
            for waiting, source in zip(layer.places.values(), layer.sources, strict=True):
                waiting.back = source.detach()
            return
        for waiting in reversed(layer.places.values()):
            if self._stream is None:
                waiting.back = waiting.host
                continue
            waiting.back = torch.empty(waiting.host.shape, dtype=waiting.host.dtype, device="cuda")
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                waiting.back.copy_(waiting.host, non_blocking=True)
            waiting.arrived = self._stream.record_event()
