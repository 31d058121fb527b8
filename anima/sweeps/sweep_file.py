"""A sweep as its YAML file says it, in W&B's format, every part with its line. The second user of yaml.

Checks what the format itself asks for. Knows nothing of which options a training has (check.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import yaml

from anima.config.paths import expanded
from anima.config.spelling import nearest
from anima.errors import ConfigError

METHODS = ("grid", "random", "bayes")
ONLY_WANDB = ("early_terminate", "run_cap", "controller", "settings", "job")
"""Keys that a local sweep does not follow."""
KEYS = (
    *("program", "command", "method", "metric", "parameters", "name", "description", "project", "entity"),
    *ONLY_WANDB,
)
PARAMETER_KEYS = ("value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q")
RANGES = ("uniform", "q_uniform", "int_uniform", "log_uniform_values", "inv_log_uniform_values", "q_log_uniform_values")
"""Distributions between min and max, both as the values they are."""
EXPONENTS = {"log_uniform", "q_log_uniform", "inv_log_uniform"}
"""Distributions whose min and max are exponents of e: a classic trap, since nobody means that."""
CURVES = ("normal", "q_normal", "log_normal", "q_log_normal")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Attributes:
        name: Name of an option.
        where: `file:line`.
        choices: Values to choose from; a single one for a constant; empty for a range or a curve.
        distribution: As W&B names it: constant, categorical, uniform, …
        low, high: Bounds of a range; mean and deviation of a curve.
        step: Distance of neighbouring values of the q_ distributions.
        probabilities: Of the choices; empty: all alike.
    """

    name: str
    where: str
    distribution: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float = 1.0
    probabilities: tuple[float, ...] = ()

    @property
    def varies(self) -> bool:
        """Whether trials differ in it."""
        return len(self.choices) != 1


@dataclass(frozen=True)
class Sweep:
    """What to try, how to choose, and what to run."""

    path: str
    text: str
    program: str
    command: tuple[str, ...]
    method: str
    metric: str
    goal: str
    parameters: tuple[Parameter, ...]
    lines: Mapping[str, int] = field(default_factory=dict)

    def at(self, key: str) -> str:
        """`file:line` of a top-level key."""
        return _place(self.path, self.lines, key)

    @property
    def sign(self) -> float:
        """1 where less is better, -1 where more is."""
        return 1.0 if self.goal == "minimize" else -1.0


def read_sweep(path: str) -> Sweep:
    """Read a sweep's YAML.

    Raises:
        ConfigError: it cannot be read, or is not what W&B's format asks for.
    """
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise ConfigError("this is not YAML", where=where, got=error.problem) from None
    except yaml.YAMLError as error:
        raise ConfigError("this is not YAML", where=path, got=error) from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("a sweep is a mapping", where=path, allowed="method:, metric:, parameters:, command:, …")
    lines = _lines(root, path)
    for key in values:
        _known(str(key), KEYS, _place(path, lines, key), "a sweep has no such key")
    method = _method(values, path, lines)
    metric, goal = _metric(values, path, lines)
    command = values.get("command", list(DEFAULT_COMMAND))
    if not isinstance(command, list):
        raise ConfigError("the command is a list of words", where=_place(path, lines, "command"), got=repr(command))
    return Sweep(
        path=path,
        text=text,
        program=str(values.get("program", "")),
        command=tuple(map(str, command)),
        method=method,
        metric=metric,
        goal=goal,
        parameters=_parameters(values, root, path),
        lines=lines,
    )


def _read(path: str) -> str:
    try:
        return expanded(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        beside = sorted(map(str, expanded(path).parent.glob("*.yaml")))
        raise ConfigError(
            "the sweep cannot be read",
            where=path,
            got=error,
            allowed=", ".join(beside) or "a YAML file; those of this repository lie in launch/sweeps/",
        ) from None


def _lines(node: yaml.MappingNode, path: str) -> dict[str, int]:
    """The line of each key; of two alike YAML would take the last without a word."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in lines:
            got = f"once more after line {lines[name]}"
            raise ConfigError(f"{name} stands twice", where=f"{path}:{line}", got=got, fix="keep the one you mean")
        lines[name] = line
    return lines


def _place(path: str, lines: Mapping[str, int], key: object) -> str:
    """`file:line` of a key; the file alone for one that is missing, merged in by `<<`, or no text (yes is True)."""
    return f"{path}:{lines[str(key)]}" if str(key) in lines else path


def _known(name: str, known: tuple[str, ...], where: str, what: str) -> None:
    if name not in known:
        guess = nearest(name, known)
        raise ConfigError(
            what + (f"; did you mean {guess}?" if guess else ""), where=where, got=name, allowed=", ".join(known)
        )


def _method(values: Mapping[str, Any], path: str, lines: Mapping[str, int]) -> str:
    method = str(values.get("method", ""))
    _known(method, METHODS, _place(path, lines, "method"), "no such method of choosing")
    return method


def _metric(values: Mapping[str, Any], path: str, lines: Mapping[str, int]) -> tuple[str, str]:
    where = _place(path, lines, "metric")
    metric = values.get("metric")
    if not isinstance(metric, dict) or "name" not in metric:
        raise ConfigError(
            "a sweep needs to know what is better", where=where, fix="metric: {name: eval/loss, goal: minimize}"
        )
    goal = str(metric.get("goal", "minimize"))
    _known(goal, ("minimize", "maximize"), where, "no such goal")
    return str(metric["name"]), goal


def _parameters(values: Mapping[str, Any], root: yaml.MappingNode, path: str) -> tuple[Parameter, ...]:
    given = values.get("parameters")
    if not isinstance(given, dict) or not given:
        raise ConfigError("a sweep needs parameters", where=path, fix="parameters: {learning_rate: {values: [1.0e-4]}}")
    (node,) = [value for key, value in root.value if key.value == "parameters"]
    places = _lines(cast(yaml.MappingNode, node), path)
    return tuple(_parameter(str(name), spec, _place(path, places, name)) for name, spec in given.items())


def _parameter(name: str, spec: object, where: str) -> Parameter:
    if not isinstance(spec, dict):
        fix = f"{name}: {{value: {spec}}}, or {{values: [{spec}]}}"
        raise ConfigError(f"the parameter {name} says not how it is chosen", where=where, got=repr(spec), fix=fix)
    if "parameters" in spec:
        raise ConfigError("options are flat: no parameters within parameters", where=where, got=f"{name}: parameters:")
    for key in spec:
        _known(str(key), PARAMETER_KEYS, where, f"the parameter {name} has no such key")
    if "value" in spec:
        return Parameter(name, where, "constant", (spec["value"],))
    if "values" in spec:
        return _categorical(name, spec, where)
    kind = str(spec.get("distribution", ""))
    low, high = ("mu", "sigma") if kind in CURVES else ("min", "max")
    if not kind and {"min", "max"} <= spec.keys():  # W&B's own rule: whole bounds mean whole numbers
        kind = "int_uniform" if all(isinstance(spec[key], int) for key in ("min", "max")) else "uniform"
    if kind in EXPONENTS:
        raise ConfigError(
            f"{kind} takes min and max as exponents of e",
            where=where,
            got=f"{kind} from {spec.get('min')} to {spec.get('max')}",
            fix=f"distribution: {kind}_values",
        )
    _known(kind, (*RANGES, *CURVES), where, f"the parameter {name} has no value, no values, and no known distribution")
    least, most = (_number(spec, key, name, where) for key in (low, high))
    if kind not in CURVES and not least < most:
        raise ConfigError(f"{name}: min is not below max", where=where, got=f"{least:g} and {most:g}")
    if "log" in kind and kind in RANGES and least <= 0:
        raise ConfigError(f"{name}: a logarithm needs positive bounds", where=where, got=f"min {least:g}")
    step = _number(spec, "q", name, where) if "q" in spec else 1.0
    if not step > 0:
        raise ConfigError(f"{name}: values lie a positive q apart", where=where, got=f"q: {step:g}")
    return Parameter(name, where, kind, low=least, high=most, step=step)


def _categorical(name: str, spec: Mapping[Any, Any], where: str) -> Parameter:
    choices = spec["values"]
    if not isinstance(choices, list) or not choices:
        raise ConfigError(f"the values of {name} are a list", where=where, got=repr(choices), fix="values: [1, 2]")
    texts = [str(choice) for choice in choices]
    if doubled := sorted({text for text in texts if texts.count(text) > 1}):
        raise ConfigError(f"{name} has the same value twice", where=where, got=", ".join(doubled), fix="keep one")
    shares = spec.get("probabilities", [1.0] * len(choices))
    numbers = isinstance(shares, list) and all(isinstance(share, int | float) for share in shares)
    if not numbers or len(shares) != len(choices):
        raise ConfigError(f"{name}: as many probabilities as values", where=where, got=repr(shares))
    given = tuple(map(float, shares)) if "probabilities" in spec else ()
    return Parameter(name, where, "categorical", tuple(choices), probabilities=given)


def _number(spec: Mapping[Any, Any], key: str, name: str, where: str) -> float:
    value = spec.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise ConfigError(
        f"{key} of {name} is no number",
        where=where,
        got=repr(value),
        fix=f"{key}: {plain_number(value)}" if plain_number(value) else f"{key}: a number",
    )


def plain_number(value: object) -> str | None:
    """`2e-5` as YAML reads it as a number, 2.0e-05; None if the text is no number."""
    try:
        text = repr(float(str(value)))
    except ValueError:
        return None
    mantissa, exponent, power = text.partition("e")
    return text if not exponent else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{power}"
