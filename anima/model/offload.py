"""Activations of some layers wait in pinned host memory between the forward and the backward pass.

Copies run beside the computation: out while the next layers compute, back while the layers behind are differentiated.
Nothing is rounded, so results have the same bits. On a CPU the copies are plain ones, for tests.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anima.model.host_memory import HostMemory, Tape

SMALLEST_BYTES = 1 << 20
"""Tensors below this stay where they are."""


@dataclass
class _Waiting:
    """A tensor that is away."""

    parts: list[Tensor]
    numel: int
    dtype: torch.dtype
    device: torch.device
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


@dataclass
class _Layer:
    """What one layer saved, by address; addresses hold while `sources` keeps the memory alive.

    `sources` must not lead to the graph, which holds this layer: Python's collector does not see such a circle, and an
    interrupted pass would keep its activations for ever.
    """

    before: "_Layer | None"
    kept: frozenset[int]
    tape: Tape
    places: dict[tuple[int, int, torch.dtype], _Waiting] = field(default_factory=dict)
    sources: list[Tensor] = field(default_factory=list)
    gone: torch.cuda.Event | None = None
    fetched: bool = False

    def finish(self) -> None:
        """Its backward pass is over: let go of everything."""
        for waiting in self.places.values():
            waiting.back = None
        self.places.clear()
        self.sources.clear()
        self.tape.release()
        self.before = None


Packed = Tensor | tuple[_Waiting, _Layer, torch.Size]


def spread(first: int, num_layers: int, count: int) -> list[int]:
    """`count` layers of [first, num_layers), evenly; the last of all stays, since it is needed back at once."""
    room = num_layers - first
    count = min(count, room)
    return [first + i * room // count for i in range(count)]


class HostOffload:
    """Sends away what chosen layers save for the backward pass."""

    def __init__(self, recomputed: Sequence[nn.Module], others: Sequence[nn.Module], memory: HostMemory) -> None:
        """Reach into the layers, given in the order of the forward pass; `remove` undoes it.

        Args:
            recomputed: Layers under transformers' activation checkpointing, of which the input is sent. Hooks of such
                a module run inside its recomputation in transformers 5.17 and outside in 5.23, so we stand in for the
                function that transformers has each of its layers call instead of its forward pass.
            others: Layers of which everything is sent; they come after the recomputed ones.
            memory: Where to.
        """
        self._first = [*recomputed, *others][0]
        self._memory = memory
        self._pass: list[_Layer] = []
        self._returning: _Layer | None = None
        self._entered: torch.autograd.graph.saved_tensors_hooks | None = None
        self._handles = []
        self._functions = [(layer, layer._gradient_checkpointing_func) for layer in recomputed]
        for layer in recomputed:
            layer._gradient_checkpointing_func = partial(self._recomputed, layer)  # type: ignore[assignment]
        for layer in others:
            self._handles.append(layer.register_forward_pre_hook(self._enter))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """The layers keep their tensors again."""
        for handle in self._handles:
            handle.remove()
        for layer, function in self._functions:
            layer._gradient_checkpointing_func = function
        self._end_pass()

    def _end_pass(self) -> None:
        """What a pass has left behind, also one that was interrupted, is given back."""
        self._memory.wait()  # what was on its way back must have arrived before its place is used for something else
        for layer in self._pass:
            layer.finish()
        self._pass, self._returning = [], None

    def _recomputed(self, module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """function(*inputs) under activation checkpointing, which saves the inputs and nothing else in our sight."""
        self._enter(module, inputs)
        try:
            output: Tensor = checkpoint(function, *inputs, use_reentrant=False)
        finally:
            self._leave()
        return output

    def _enter(self, module: nn.Module, _: object) -> None:
        if not (torch.is_grad_enabled() and module.training):
            return
        if module is self._first:
            self._end_pass()
        before = self._pass[-1] if self._pass else None
        if before is not None:
            self._let_go(before.before)
        layer = _Layer(before, frozenset(p.data_ptr() for p in module.parameters()), Tape(self._memory))
        self._pass.append(layer)
        self._entered = torch.autograd.graph.saved_tensors_hooks(lambda tensor: self._send(tensor, layer), self._fetch)
        self._entered.__enter__()

    def _leave(self, *_: object) -> None:
        if self._entered is not None:
            self._entered.__exit__(None, None, None)
            self._entered = None
            self._pass[-1].gone = self._memory.event()

    def _finish(self, now: _Layer) -> None:
        """The backward pass has come to layer `now`, so the one behind it is through."""
        if self._returning is not None and self._returning is not now:
            self._returning.finish()
        self._returning = now

    @staticmethod
    def _let_go(layer: _Layer | None) -> None:
        """Free the device memory of a layer whose copies the computation has to wait for, if they are not done."""
        if layer is not None:
            if layer.gone is not None:
                torch.cuda.current_stream().wait_event(layer.gone)
            layer.sources.clear()

    def _send(self, tensor: Tensor, layer: _Layer) -> Packed:
        size = tensor.numel() * tensor.element_size()
        source = tensor.detach()  # an output that its own node holds is a circle as well
        if size < SMALLEST_BYTES or not tensor.is_contiguous() or tensor.data_ptr() in layer.kept:
            return source
        key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        if key not in layer.places:
            layer.places[key] = _Waiting(layer.tape.write(source), tensor.numel(), tensor.dtype, tensor.device)
            layer.sources.append(source)
        return layer.places[key], layer, tensor.shape

    def _fetch(self, packed: Packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        waiting, layer, shape = packed
        self._finish(layer)
        self._start_fetching(layer)
        self._start_fetching(layer.before)  # beside the computation of this layer
        if waiting.back is None:
            raise RuntimeError("another forward pass came before this backward pass and took its place in host memory")
        if waiting.arrived is not None:
            torch.cuda.current_stream().wait_event(waiting.arrived)
        return waiting.back.view(shape)

    def _start_fetching(self, layer: _Layer | None) -> None:
        if layer is None or layer.fetched:
            return
        layer.fetched = True
        if layer.sources:  # the last layers are needed before anybody wanted their memory
            for waiting, source in zip(layer.places.values(), layer.sources, strict=True):
                waiting.back = source
            return
        for waiting in reversed(layer.places.values()):
            waiting.back = torch.empty(waiting.numel, dtype=waiting.dtype, device=waiting.device)
            layer.tape.read(waiting.parts, waiting.back)
            waiting.arrived = self._memory.event()
