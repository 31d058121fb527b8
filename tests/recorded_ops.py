"""A recorder for CPUs that does what a CUDA graph does: notes torch's operations with their tensors, then runs these
again on the same memory, without the Python between them. What a step asked of the host while it was recorded is fixed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anima.model.replay import Step

WAITING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""Operations for which the host waits for a GPU."""


class _Notes(TorchDispatchMode):
    """Notes every operation that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Sequence[Any], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in WAITING:
            raise RuntimeError(f"the host would wait in {func}")
        output = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, output))
        return output


class _Recording:
    """Operations and where the result lies."""

    def __init__(self, notes: _Notes, output: Tensor) -> None:
        self._operations = notes.operations
        self._output = output
        self._is_first = True
        self.closed = False

    def replay(self) -> Tensor:
        assert not self.closed
        if not self._is_first:  # a CPU cannot record without running: that was the first run
            for func, args, kwargs, output in self._operations:
                again = func(*args, **kwargs)
                if not any(returned.alias_info for returned in func._schema.returns):  # neither a view nor in place
                    for old, new in zip(_tensors(output), _tensors(again), strict=True):
                        old.copy_(new)
        self._is_first = False
        return self._output

    def close(self) -> None:
        self.closed = True
        self._operations = []


def _tensors(output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, tuple | list) else (output,)
    return [part for part in outputs if isinstance(part, Tensor)]


class OpRecorder:
    """See the module; counts what it is asked for."""

    def __init__(self) -> None:
        self.warmed_up = self.proven = 0
        self.recordings: list[_Recording] = []
        self.refusals: list[Exception] = []
        self.trusted = False

    def warm_up(self, step: Step) -> Tensor:
        self.warmed_up += 1
        return step()

    def prove(self, step: Step) -> Tensor:
        self.proven += 1
        with _Notes():
            return step()

    def record(self, step: Step) -> _Recording:
        with _Notes() as notes:
            output = step()
        self.recordings.append(_Recording(notes, output))
        return self.recordings[-1]

    def refuse(self, reason: Exception) -> None:
        self.refusals.append(reason)
