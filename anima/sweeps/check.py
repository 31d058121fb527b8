"""Finds in the first second what would fail, or mislead, forty trials later.

Every value that a trial can get is parsed as launch/train.py will parse it. Reads no data and no model.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from anima.config.cli import parse_config
from anima.config.flags import Flag, flag_table, unknown_name
from anima.config.schema import Config
from anima.errors import ConfigError
from anima.sweeps.command import trial_command, with_flags
from anima.sweeps.sweep_file import CURVES, Parameter, Sweep, plain_number

SET_LOCALLY = ("output_dir", "resume", "tracker")
"""Options that a local sweep gives every trial itself (trial.py)."""
OWNED = (*SET_LOCALLY, "run_name")
"""Options that belong to a trial's place in the sweep."""
PARTS = ("train/", "eval/")
MOST_PARSED = 256
"""Combinations of a grid that are parsed as a whole; beyond, every value once beside the first of the others."""
TOKENS = frozenset(
    {
        *("train_files", "eval_files", "dataset_format", "chat_template", "max_seq_length", "source_max_len"),
        *("target_max_len", "truncation", "train_on", "model_name_or_path", "data_cache_dir"),
    }
)
"""Options that the token cache's key depends on."""


def check_sweep(sweep: Sweep, extra: Mapping[str, str]) -> list[str]:
    """Check that every trial can start.

    Args:
        sweep: What is checked.
        extra: Flags that are given beside the sweep's, and win.

    Returns:
        What a person should know, a line each.

    Raises:
        ConfigError: a parameter is no option, a value has the wrong type, the metric is never measured, …
    """
    flags = flag_table(Config)
    _check_extra(sweep, extra, flags)
    if not Path(sweep.program).is_file():
        fix = "program: launch/train.py, and start it in the repository's folder"
        raise ConfigError("there is no such program", where=sweep.at("program"), got=sweep.program, fix=fix)
    for parameter in sweep.parameters:
        _check_name(parameter, flags)
        _check_numbers(parameter, flags[parameter.name])
        if sweep.method == "grid" and not parameter.choices:
            fix = f"{parameter.name}: {{values: [..]}}, or method: random"
            raise ConfigError("a grid has no ranges", where=parameter.where, got=parameter.distribution, fix=fix)
    config = None
    for values in combinations(sweep):
        config = _parse(sweep, values, extra)
    if config is None:
        raise AssertionError("a sweep has a combination")
    _check_metric(sweep, config)
    return _remarks(sweep, config)


def candidates(parameter: Parameter) -> tuple[Any, ...]:
    """Values that stand for all that the parameter can take: all choices; bounds and something between."""
    if parameter.choices:
        return parameter.choices
    if parameter.distribution in CURVES:
        return (parameter.low + 0.37 * parameter.high,)
    low, high = parameter.low, parameter.high
    if parameter.distribution == "int_uniform" or parameter.distribution.startswith("q_"):
        return low, high
    return low, low + 0.37 * (high - low), high


def combinations(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Combinations that show whether all can start."""
    options = {parameter.name: candidates(parameter) for parameter in sweep.parameters}
    if sweep.method == "grid" and math.prod(map(len, options.values())) <= MOST_PARSED:
        yield from (dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))
        return
    first = {name: values[0] for name, values in options.items()}
    yield first
    for name, values in options.items():
        yield from (first | {name: value} for value in values[1:])


def _check_extra(sweep: Sweep, extra: Mapping[str, str], flags: Mapping[str, Flag]) -> None:
    """Refuse flags that would be ignored, or that would make a trial another one than its parameters tell."""
    where = {parameter.name: parameter.where for parameter in sweep.parameters}
    for name, value in extra.items():
        got = f"-- --{name} {value}"
        if name not in flags:
            raise unknown_name(name, flags, where="command line", got=f"--{name}")
        if name in SET_LOCALLY:
            fix = "take it out; --sweep_dir names the folder of all trials"
            raise ConfigError(f"a local sweep sets --{name} itself", where="command line", got=got, fix=fix)
        if name in where:
            fix = f"take it out, or write {name}: {{value: {value}}} at {where[name]}"
            raise ConfigError(f"--{name} is the sweep's to choose", where="command line", got=got, fix=fix)


def _check_name(parameter: Parameter, flags: Mapping[str, Flag]) -> None:
    if parameter.name in OWNED:
        raise ConfigError(
            f"--{parameter.name} is not for a sweep to choose",
            where=parameter.where,
            got=f"{parameter.name}:",
            fix="give it in the sweep's command",
        )
    if parameter.name not in flags:
        raise unknown_name(parameter.name, flags, where=parameter.where, got=f"{parameter.name}:")


def _check_numbers(parameter: Parameter, flag: Flag) -> None:
    """Refuse a number that YAML reads as text: the trial would get it, but W&B could neither sort nor plot it."""
    for value in parameter.choices:
        if isinstance(value, str) and flag.annotation in (int, float) and (number := plain_number(value)):
            raise ConfigError(
                f"YAML reads {value} as text", where=parameter.where, got=repr(value), allowed=number, fix=number
            )


def _parse(sweep: Sweep, values: Mapping[str, Any], extra: Mapping[str, str]) -> Config:
    """The config of a trial; errors name the line of the sweep that is at fault."""
    places = {"WANDB_SWEEP_ID": "SWEEP", "WANDB_RUN_ID": "RUN"}
    _, argv = trial_command(sweep, values, places)
    argv = with_flags(argv, extra)
    for name, value in places.items():
        argv = [word.replace(f"${name}", value).replace(f"${{{name}}}", value) for word in argv]
    try:
        config, options = parse_config(argv)
    except ConfigError as error:
        wheres = {f"--{parameter.name}": parameter.where for parameter in sweep.parameters}
        wheres |= {f"--{name}": f"command line, behind --: --{name}" for name in extra}
        where = wheres.get(str(error.where), f"{sweep.at('command')}: {error.where}")
        trial = ", ".join(f"{name} {value}" for name, value in values.items())
        got = f"{error.got} (a trial with {trial})"
        raise ConfigError(error.what, where=where, got=got, allowed=error.allowed, fix=error.fix) from None
    if options.dry_run:
        raise ConfigError("--dry_run trains nothing", where=sweep.at("command"), fix="take it out")
    return config


def _check_metric(sweep: Sweep, config: Config) -> None:
    """The metric must be one that a run logs, as far as its name tells."""
    name = sweep.metric
    if not name.startswith(PARTS):
        raise ConfigError(
            "no run logs such a metric",
            where=sweep.at("metric"),
            got=name,
            allowed="eval/loss, train/loss; for dpo eval/rewards/accuracies, eval/rewards/margins, …",
            fix="metric: {name: eval/loss, goal: minimize}",
        )
    if name.startswith("eval/") and not config.data.eval_files and not config.data.eval_size:
        raise ConfigError(
            f"{name} is never measured: nothing is held out",
            where=sweep.at("metric"),
            got="no --eval_files, --eval_size 0",
            fix="add --eval_size=256 to the command, or the like",
        )
    upward = name.rpartition("/")[2] in ("accuracies", "margins", "chosen")
    if upward != (sweep.goal == "maximize") and (upward or name.endswith("loss")):
        right = "maximize" if upward else "minimize"
        raise ConfigError(
            f"{sweep.goal} {name}?", where=sweep.at("metric"), got=f"goal: {sweep.goal}", fix=f"goal: {right}"
        )


def _remarks(sweep: Sweep, config: Config) -> list[str]:
    varied = [parameter for parameter in sweep.parameters if parameter.varies]
    lines = [f"{len(varied)} parameters vary: {', '.join(f'{p.name} ({_size(p)})' for p in varied)}"]
    if sweep.method == "grid":
        lines.append(f"the grid has {math.prod(len(p.choices) for p in varied):,} trials")
    names = {parameter.name for parameter in varied}
    own = sorted(names & TOKENS)
    lines.append(
        f"tokens: {f'prepared anew for each {json.dumps(own)}' if own else 'prepared once, shared by all trials'}"
    )
    if config.preference.needs_reference and config.objective == "dpo":
        changed = sorted(names & {*TOKENS, "adapter_path", "reference", "compute_dtype", "seed"})
        lines.append(f"reference: {f'asked anew for each {json.dumps(changed)}' if changed else 'asked once, shared'}")
    return lines


def _size(parameter: Parameter) -> str:
    if parameter.choices:
        return f"{len(parameter.choices)} values"
    return (
        f"{parameter.low:g} to {parameter.high:g}" if parameter.distribution not in CURVES else parameter.distribution
    )


def extra_flags(words: Sequence[str]) -> dict[str, str]:
    """Flags given beside a sweep, each as `--key value` or `--key=value`.

    Raises:
        ConfigError: a word belongs to no flag, or a flag has no value or two.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or (not equals and (not rest or rest[0].startswith("--"))):
            raise ConfigError("flags behind -- are --key value", where="command line", got=word)
        if name in found:
            raise ConfigError(f"--{name} is given twice", where="command line", got=word, fix="keep the one you mean")
        found[name] = value if equals else rest.pop(0)
    return found
