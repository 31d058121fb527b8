"""One optimizer step: the gradient of the mean over everything scored in it, on all ranks.

The order: count what the step weighs, one reduction on the device, then forward and backward per
micro-batch, then the update. Nothing but the update waits for the device.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from anima import distributed
from anima.errors import TrainingError
from anima.objectives.objective import MetricSum, Objective, ObjectiveOutput
from anima.train import faults
from anima.train.engine import Engine, StepOutcome
from anima.train.metrics import MetricSums
from anima.transfer import send


def train_step(
    engine: Engine,
    objective: Objective[Any],
    micro_batches: Sequence[Any],
    learning_rate: float,
    metrics: MetricSums,
    flags: Sequence[float] = (),
) -> StepOutcome:
    """Run one optimizer step over this rank's micro-batches.

    Every rank passes the same number of micro-batches.

    Args:
        engine: DeepSpeed engine in train mode.
        objective: Loss that matches the micro-batches' type.
        micro_batches: This rank's part of the step, one or more.
        learning_rate: For this step.
        metrics: Where the objective's sums go.
        flags: Numbers that every rank wants to know the sum of; they travel with the weight, at no cost.
    """
    local = [float(sum(objective.weight(batch) for batch in micro_batches)), *flags]
    weight, *agreed = distributed.sum_over_ranks(send(torch.tensor(local), engine.device)).unbind()
    with engine.accumulating():
        for batch in micro_batches:
            poisoned = faults.fire("forward")
            output = objective(engine, batch.to(engine.device))
            if poisoned:
                output = _poisoned(output)
            engine.backward(output.loss_sum, weight)
            faults.fire("backward")
            for name, metric in output.metrics.items():
                metrics.add(name, metric)
    outcome = engine.step(learning_rate)  # it has waited for the device, so reading the sums waits for nothing
    return replace(outcome, agreed=tuple(torch.stack(agreed).tolist()) if agreed else ())


def _poisoned(output: ObjectiveOutput) -> ObjectiveOutput:
    """What a loss that is not a number gives: for the tests of what happens then."""
    metrics = {name: MetricSum(metric.total * float("nan"), metric.count) for name, metric in output.metrics.items()}
    return ObjectiveOutput(output.loss_sum * float("nan"), metrics)


class GradientProbe:
    """Watches that every parameter given gets a non-zero gradient in the first step.

    LoRA's B matrices start at zero, so one that gets no gradient never trains and nobody would see it
    (activation checkpointing without input gradients is the classic cause).
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        """Hook the parameters; remove the hooks with `check`."""
        self._names = list(parameters)
        first = next(iter(parameters.values()))
        self._seen = torch.zeros(len(self._names), device=first.device)
        self._handles = [
            parameter.register_hook(self._observer(index)) for index, parameter in enumerate(parameters.values())
        ]

    def _observer(self, index: int) -> Any:  # noqa: ANN401  (torch's hook type is not public)
        def observe(gradient: Tensor) -> None:
            self._seen[index] = torch.maximum(self._seen[index], (gradient != 0).any().float())

        return observe

    def forget(self) -> None:
        """Begin anew: what was seen so far was a rehearsal."""
        self._seen.zero_()

    def check(self) -> None:
        """After the first step, on every rank.

        Raises:
            TrainingError: some parameter got no gradient on any rank; names them.
        """
        for handle in self._handles:
            handle.remove()
        seen = distributed.sum_over_ranks(self._seen).tolist()
        silent = [name for name, count in zip(self._names, seen, strict=True) if count == 0]
        if silent:
            shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
            raise TrainingError(
                f"{len(silent)} of {len(self._names)} LoRA matrices got no gradient in the first step",
                got=shown,
                allowed="a non-zero gradient in every lora_B",
                fix="check --lora_target_modules: does the model use these layers in its forward pass?",
            )
