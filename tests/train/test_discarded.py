"""How a measured pass may end without ending the others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anima.train.discarded import run_pass


class Failing:
    """An objective whose pass ends with `error`."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def weight(self, batch: object) -> int:
        return 1

    def __call__(self, policy: object, batch: object) -> Any:
        raise self._error


ENGINE: Any = SimpleNamespace(device=torch.device("cpu"), backward=None)
BATCH = SimpleNamespace(to=lambda device: None)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        SystemError("<built-in method apply of FunctionMeta object at 0x1> returned NULL without setting an exception"),
    ],
)
def test_a_pass_that_runs_out_of_memory_says_so(error: BaseException) -> None:
    assert run_pass(ENGINE, Failing(error), BATCH) is False


@pytest.mark.parametrize("error", [SystemError("bad argument to internal function"), RuntimeError("a bug")])
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    with pytest.raises(type(error), match=str(error)):
        run_pass(ENGINE, Failing(error), BATCH)
