"""What to try next: the next point of a grid, a random one, or one that earlier results speak for (optuna's TPE).

The only user of optuna. Knows nothing of runs; a proposal depends on the seed and the trials before it alone.
"""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from anima.errors import ConfigError
from anima.sweeps.journal import Trial
from anima.sweeps.sweep_file import Parameter, Sweep

STARTUP_TRIALS = 5
"""Random trials before earlier results are listened to."""


def check_local(sweep: Sweep) -> None:
    """Refuse what only W&B can sample.

    Raises:
        ConfigError: a distribution, or probabilities, that are not known here.
    """
    for parameter in sweep.parameters:
        _distribution(parameter)


def propose(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Parameters of the next trial; None when a grid is used up.

    Args:
        sweep: What may be chosen, and how.
        trials: All trials so far, running ones included.
        seed: Of everything random.
    """
    constants = {p.name: p.choices[0] for p in sweep.parameters if not p.varies}
    if sweep.method == "grid":
        tried = [dict(trial.parameters) for trial in trials]
        names = [parameter.name for parameter in sweep.parameters]
        points = itertools.product(*(parameter.choices for parameter in sweep.parameters))
        return next((point for values in points if (point := dict(zip(names, values, strict=True))) not in tried), None)
    varied = [parameter for parameter in sweep.parameters if parameter.varies]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(sampler=_sampler(sweep.method, seed + len(trials)))
        for trial in trials:
            study.add_trial(_frozen(trial, varied, sweep.sign))
        asked = study.ask({parameter.name: _distribution(parameter) for parameter in varied})
    chosen = {parameter.name: _value(parameter, asked.params[parameter.name]) for parameter in varied}
    return {parameter.name: {**constants, **chosen}[parameter.name] for parameter in sweep.parameters}


def _sampler(method: str, seed: int) -> optuna.samplers.BaseSampler:
    if method == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    # constant_liar: what runs at the same time counts as tried, so that workers do not all try the same.
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True)


def _distribution(parameter: Parameter) -> BaseDistribution:
    """The same in optuna's words; choices stand for themselves by their place in the list."""
    if parameter.choices and not parameter.probabilities:
        return CategoricalDistribution(tuple(range(len(parameter.choices))))
    low, high = parameter.low, parameter.high
    if parameter.distribution == "uniform":
        return FloatDistribution(low, high)
    if parameter.distribution == "log_uniform_values":
        return FloatDistribution(low, high, log=True)
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(low), int(high))
    if parameter.distribution == "q_uniform":
        return FloatDistribution(low, high, step=parameter.step)
    if parameter.distribution == "q_log_uniform_values" and parameter.step == int(low) / low == 1:
        return IntDistribution(int(low), int(high), log=True)
    raise ConfigError(
        "only W&B chooses values like that",
        where=parameter.where,
        got="probabilities" if parameter.probabilities else parameter.distribution,
        allowed="values, uniform, q_uniform, int_uniform, log_uniform_values",
        fix=f"write {parameter.name} with one of these, or use wandb sweep",
    )


def _value(parameter: Parameter, chosen: Any) -> Any:  # noqa: ANN401  (as YAML has it)
    if parameter.choices:
        return parameter.choices[chosen]
    if isinstance(chosen, float):
        rounded = float(f"{chosen:.6g}")  # 0.30000000000000004 helps nobody
        return min(max(rounded, parameter.low), parameter.high)
    return chosen


def _chosen(parameter: Parameter, value: Any) -> Any:  # noqa: ANN401
    return parameter.choices.index(value) if parameter.choices else value


def _frozen(trial: Trial, varied: Sequence[Parameter], sign: float) -> FrozenTrial:
    """A former trial as optuna wants it; what failed, or has no metric, says nothing."""
    known = trial.metric is not None and math.isfinite(trial.metric) and trial.state == "finished"
    state = TrialState.COMPLETE if known else TrialState.FAIL if trial.state in ("failed", "finished") else None
    parameters: Mapping[str, Any] = {p.name: _chosen(p, trial.parameters[p.name]) for p in varied}
    distributions = {p.name: _distribution(p) for p in varied}
    frozen = create_trial(
        state=state or TrialState.RUNNING,
        params=dict(parameters),
        distributions=distributions,
        value=sign * trial.metric if known and trial.metric is not None else None,
    )
    if state is None:
        frozen.datetime_start, frozen.datetime_complete = datetime.now(), None
    return frozen
