"""Held-out loss during training: the exact mean over all scored tokens of the held-out set, on all ranks."""

from collections.abc import Iterable
from typing import Any

import torch

from anima.objectives.objective import Objective
from anima.train.engine import Engine
from anima.train.metrics import MetricSums


def evaluate(engine: Engine, objective: Objective[Any], micro_batches: Iterable[Any]) -> dict[str, float]:
    """The objective's metrics over the held-out set, e.g. {"loss": 2.1}.

    A collective: every rank calls it with the same number of micro-batches.
    """
    sums = MetricSums()
    engine.eval_mode()
    with torch.no_grad():
        for batch in micro_batches:
            output = objective(engine, batch.to(engine.device))
            for name, metric in output.metrics.items():
                sums.add(name, metric)
    engine.train_mode()
    return sums.reduce()
