"""Forward and backward passes that leave no trace: to learn what they cost, or that they fit into memory.

In the end every gradient becomes a NaN: then DeepSpeed itself skips the step and drops all it has. Until then they are
real, because a GPU at the limit of its power computes faster with numbers that are all alike.

A pass that runs out of memory does not end the others: ranks can agree on what to do before any gradient travels.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from anima.objectives.objective import Objective
from anima.train import saving
from anima.train.engine import Engine

_LOST = "without setting an exception"
"""How an out-of-memory error within a layer that is computed again came out of autograd on an H100 (torch 2.11)."""


@contextmanager
def discarded(engine: Engine) -> Iterator[None]:
    """A step that is thrown away, with its gradients and random numbers; `run_pass` goes in here. A collective."""
    random = saving.random_state(engine.device)
    with engine.accumulating():
        yield
        engine.spoil()
    if not engine.step(0.0).skipped:
        raise AssertionError("a step of NaN was not skipped")
    saving.set_random_state(random, engine.device)


def run_pass(engine: Engine, objective: Objective[Any], batch: Any) -> bool:  # noqa: ANN401  (the objective's)
    """Forward and backward of a micro-batch within `discarded`; False if this rank's memory did not suffice."""
    try:
        weight = torch.tensor(max(1.0, float(objective.weight(batch))), device=engine.device)
        engine.backward(objective(engine, batch.to(engine.device)).loss_sum, weight)
    except torch.OutOfMemoryError:
        return False
    except SystemError as error:
        if _LOST not in str(error):
            raise
        return False
    return True


def release(device: torch.device) -> None:
    """Give back what is no longer used: blocks cut to the sizes of one pass are in the way of another's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
