"""Flags as text: which ones a schema has, and a command line cut into what was given for each.

Knows neither how text becomes a value (cli.py) nor what an option means (schema.py).
"""

import ast
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from anima.config.paths import with_home
from anima.config.spelling import nearest
from anima.errors import ConfigError

MACHINE_FOLDERS = ("data_cache_dir", "reference_cache_dir", "base_staging_dir")
"""Options without effect on the result that belong to a machine rather than to a run."""
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_WHOLE_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class Flag:
    """One option of a schema.

    Attributes:
        name: Field, flag and YAML key.
        annotation: Its type.
        required: True if it has no default.
        bare: Value of the flag when it stands alone; None if it cannot.
    """

    name: str
    annotation: Any
    required: bool
    bare: str | None = None

    @property
    def takes_many(self) -> bool:
        """True if it takes any number of values."""
        return get_origin(self.annotation) is tuple

    @property
    def allowed(self) -> str:
        """What it accepts, in words."""
        return _in_words(self.annotation)

    def nearest_value(self, text: str) -> str | None:
        """What was probably meant by a text that this flag refuses: a choice, or 10000 for 1e4."""
        if get_origin(self.annotation) is Literal:
            return nearest(text, [str(choice) for choice in get_args(self.annotation)])
        if self.annotation is int or int in get_args(self.annotation):
            try:
                number = float(text)
            except ValueError:
                return None
            return str(int(number)) if number.is_integer() else None
        return None


@dataclass(frozen=True)
class Given:
    """What a user wrote for one flag, still as text.

    Attributes:
        name: The flag.
        values: The written values.
        where: `--flag`, or `file:line (key)`.
    """

    name: str
    values: tuple[str, ...]
    where: str


def flag_table(schema: type) -> dict[str, Flag]:
    """All flags of a schema by name; fields that are dataclasses are sections and lend their own fields."""
    hints = get_type_hints(schema)
    table: dict[str, Flag] = {}
    for item in fields(schema):
        annotation = hints[item.name]
        if is_dataclass(annotation) and isinstance(annotation, type):
            table.update(flag_table(annotation))
        else:
            required = item.default is MISSING and item.default_factory is MISSING
            table[item.name] = Flag(item.name, annotation, required, item.metadata.get("bare"))
    return table


def with_environment(given: Mapping[str, Given], environ: Mapping[str, str]) -> dict[str, Given]:
    """What was given, and below it the folders of this machine that variables name (ANIMA_DATA_CACHE_DIR, …).

    `$NAME`, `${NAME}` and a leading `~` in the output folder are replaced, so that one sweep's command gives every
    trial its own, and a YAML's folder means what a shell would make of it.

    Raises:
        ConfigError: the output folder names a variable that is not set.
    """
    found = {}
    for name in MACHINE_FOLDERS:
        variable = f"ANIMA_{name.upper()}"
        if environ.get(variable):
            found[name] = Given(name, (environ[variable],), f"the variable {variable}")
    found |= given
    if output_dir := found.get("output_dir"):
        values = tuple(filled_in(text, output_dir.where, environ) for text in output_dir.values)
        found["output_dir"] = replace(output_dir, values=values)
    return found


def filled_in(folder: str, where: str, environ: Mapping[str, str]) -> str:
    """A folder as a shell would read it: `$NAME`, `${NAME}` and a leading `~` replaced.

    Raises:
        ConfigError: it names a variable that is not set.
    """
    for name in (found[1] or found[2] for found in _VARIABLE.finditer(folder)):
        if name not in environ:
            raise ConfigError(
                f"the variable {name} is not set",
                where=where,
                got=folder,
                fix=f"write the folder out, or start it where {name} is set (wandb agent sets WANDB_*)",
            )
    return with_home(_VARIABLE.sub(lambda found: environ[found[1] or found[2]], folder), where)


def read_argv(argv: Sequence[str], flags: Mapping[str, Flag]) -> dict[str, Given]:
    """Cut a command line into what was given for each flag.

    `--key value` and `--key=value` are the same; a list takes what follows up to the next flag, one `--key=value`,
    or Python's text of a list (`--key=['a', 'b']`, as W&B agents write it).

    Raises:
        ConfigError: an unknown flag, a flag given twice, a value without a flag or a flag without a value.
    """
    given: dict[str, Given] = {}
    rest = deque(_without_local_rank(argv))
    while rest:
        token = rest.popleft()
        if not _is_flag(token):
            raise _stray_value(token, given)
        name, equals, attached = token[2:].partition("=")
        if name not in flags:
            raise unknown_name(name, flags, where="command line", got=f"--{name}")
        if name in given:
            raise ConfigError(
                f"--{name} is given twice",
                where="command line",
                got=f"first {' '.join(given[name].values)!r}, then {token}",
                allowed=f"one list: --{name} A B C" if flags[name].takes_many else "each flag once",
                fix="keep the one you mean",
            )
        values = (attached,) if equals else _following_values(flags[name], rest)
        given[name] = Given(name, values, f"--{name}")
        if flags[name].takes_many and len(values) == 1:
            if values[0] == "None":
                raise wrong_value(flags[name], given[name])
            given[name] = Given(name, _spelled_out(values[0]), f"--{name}")
    return given


def unknown_name(name: str, flags: Mapping[str, Flag], *, where: str, got: str) -> ConfigError:
    """The error for a name that no flag has, with the nearest one that exists."""
    guess = nearest(name, flags)
    return ConfigError(
        f"there is no option {name!r}" + (f"; did you mean {guess}?" if guess else ""),
        where=where,
        got=got,
        allowed="the options that --help lists",
        fix=f"write {got.replace(name, guess)}" if guess else "take it out, or look it up with --help",
    )


def wrong_value(flag: Flag, given: Given) -> ConfigError:
    """The error for values that are not of the flag's type, with what was probably meant."""
    alone = given.values[0] if len(given.values) == 1 else None
    guess = None if alone is None else flag.nearest_value(alone)
    mended = f"--{flag.name} {guess}" if given.where.startswith("--") else f"{flag.name}: {guess}"
    return ConfigError(
        f"{flag.name} cannot have this value" + (f"; did you mean {guess}?" if guess else ""),
        where=given.where,
        got=repr(alone) if alone is not None else f"{len(given.values)} values: {' '.join(given.values)}",
        allowed=flag.allowed,
        fix=mended if guess else None,
    )


def _without_local_rank(argv: Sequence[str]) -> list[str]:
    """Drop what launchers add: `--local_rank=N` or `--local-rank N`; ranks come from the environment."""
    kept: list[str] = []
    tokens = deque(argv)
    while tokens:
        token = tokens.popleft()
        name, equals, _ = token.replace("-", "_").partition("=")
        if name != "__local_rank" or (equals and not _WHOLE_NUMBER.fullmatch(token.partition("=")[2])):
            kept.append(token)
        elif not equals and tokens and _WHOLE_NUMBER.fullmatch(tokens[0]):
            tokens.popleft()
    return kept


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


def _following_values(flag: Flag, rest: deque[str]) -> tuple[str, ...]:
    """Take this flag's values off the front of the remaining command line."""
    if flag.takes_many:
        values = []
        while rest and not _is_flag(rest[0]):
            values.append(rest.popleft())
        return tuple(values)
    if rest and not _is_flag(rest[0]):
        return (rest.popleft(),)
    if flag.bare is not None:
        return (flag.bare,)
    raise ConfigError(
        f"--{flag.name} needs a value",
        where=f"--{flag.name}",
        got="nothing" if not rest else f"the next flag, {rest[0]}",
        allowed=flag.allowed,
        fix=f"--{flag.name} {'True' if flag.annotation is bool else 'VALUE'}",
    )


def _spelled_out(value: str) -> tuple[str, ...]:
    """The items of `['a', 'b']`; any other text is one item (a glob may begin with a bracket)."""
    if value.startswith("[") and value.endswith("]"):
        try:
            items = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return (value,)
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items)
    return (value,)


def _stray_value(token: str, given: Mapping[str, Given]) -> ConfigError:
    before = list(given)[-1] if given else None
    return ConfigError(
        f"{token!r} belongs to no flag",
        where="command line" if before is None else f"command line, after --{before}",
        got=repr(token),
        allowed="--key value or --key=value; a list as --key A B C",
        fix="quote a value that holds spaces, and write every flag with two dashes",
    )


def _in_words(annotation: object) -> str:
    """A type as users know it: `nf4 or none`, `a whole number or None`."""
    if annotation is bool:
        return "True or False"
    if annotation is int:
        return "a whole number"
    if annotation is float:
        return "a number, such as 0.5 or 1e-4"
    if annotation is NoneType:
        return "None"
    if get_origin(annotation) is Literal:
        choices = [str(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if get_origin(annotation) is tuple:
        return f"any number of values, each {_in_words(get_args(annotation)[0])}"
    if get_args(annotation):
        return " or ".join(_in_words(part) for part in get_args(annotation))
    return "text"
