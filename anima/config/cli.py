"""Command line and YAML become a Config, and back. The only user of tyro and of yaml.

A YAML key is a flag put before the command line: both are text until tyro types it, so `2e-5` means the same in
both. Force: default < ANIMA_… folders < `--config` YAML < command line. Knows nothing of what the options do.
"""

import contextlib
import io
import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast, get_type_hints

import tyro
import yaml

from anima.config.flags import Flag, Given, flag_table, read_argv, unknown_name, with_environment, wrong_value
from anima.config.paths import expanded
from anima.config.schema import Config
from anima.disk import replace_file
from anima.errors import ConfigError

Schema = TypeVar("Schema")
Options = TypeVar("Options", bound="ConfigFile")

_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp")}
_NULL_TAG = "tag:yaml.org,2002:null"
_LINES = "lines of `key: value`"
_FLAT = "write each option on its own line at the left edge; a list only where several values belong"


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """What every program with a config has; not part of it, so it is not saved with it."""

    config: str | None = None
    """YAML file whose keys are flag names; flags on the command line win over it."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(ConfigFile):
    """What is done with a config."""

    dry_run: bool = field(default=False, metadata={"bare": "True"})
    """Print the resolved config and the merged DeepSpeed JSON, then stop."""


@dataclass(frozen=True, kw_only=True)
class _TrainFlags(LaunchOptions, Config):
    """Fine-tune a language model. Force: default < --config YAML < command line.

    A boolean takes True or False; a list takes several values: --train_files a.jsonl b.jsonl.
    """


def parse_config(argv: Sequence[str], *, prog: str = "launch/train.py") -> tuple[Config, LaunchOptions]:
    """Read a training command: the run's config, and what to do with it. Raises as `parse_command`."""
    return parse_command(_TrainFlags, LaunchOptions, argv, prog=prog)


def parse_command(
    flags: type, options: type[Options], argv: Sequence[str], *, prog: str, spare: Mapping[str, str] | None = None
) -> tuple[Config, Options]:
    """Read the command line of a program that takes the flags of training and some of its own.

    Args:
        flags: Dataclass of all flags, for the help: a subclass of `options` and Config.
        options: Dataclass of the program's own flags.
        argv: The command line without the program's name.
        prog: Program's name in help and examples.
        spare: Texts of flags that only training needs, used where they are not given.

    Raises:
        ConfigError: anything unknown, doubled, missing, of the wrong type or contradictory.
        SystemExit: status 0 after `--help` was printed.
    """
    if "--help" in argv or "-h" in argv:
        _print_help(flags, prog)
    given = read_argv(argv, flag_table(flags))
    own_names = flag_table(options)
    own = _assemble(options, {name: item for name, item in given.items() if name in own_names}, prog)
    chosen = {name: item for name, item in given.items() if name not in own_names}
    if own.config is not None:
        chosen = read_yaml(own.config, flag_table(Config)) | chosen
    filled = {name: Given(name, (text,), f"--{name}") for name, text in (spare or {}).items()}
    return _assemble(Config, with_environment(filled | chosen, os.environ), prog), own


def parse_flags(schema: type[Schema], argv: Sequence[str], *, prog: str) -> Schema:
    """Read the command line of a program with its own small schema and no YAML; raises as `parse_command`.

    Args:
        schema: Dataclass of flags; fields that are dataclasses are groups of flags.
        argv: The command line without the program's name.
        prog: Program's name in help and examples.
    """
    if {"--help", "-h"} & set(argv):
        _print_help(schema, prog)
    return _assemble(schema, read_argv(argv, flag_table(schema)), prog)


def read_yaml(path: str, flags: Mapping[str, Flag]) -> dict[str, Given]:
    """Read a flat YAML file as if its keys were flags; values stay the text that stands in the file.

    Raises:
        ConfigError: the file is missing, empty, broken or nested, or a key is unknown or stands there twice.
    """
    given: dict[str, Given] = {}
    for key, node in _yaml_entries(path):
        name, line = str(key.value), key.start_mark.line + 1
        if name in flag_table(LaunchOptions):
            fix = f"take it out and give --{name} on the command line"
            raise ConfigError(f"{name!r} is no part of a config", where=f"{path}:{line}", got=f"{name}:", fix=fix)
        if isinstance(node, yaml.MappingNode):
            raise ConfigError("keys are flat", where=f"{path}:{line}", got=f"keys under {name!r}", fix=_FLAT)
        if name not in flags:
            raise unknown_name(name, flags, where=f"{path}:{line}", got=f"{name}:")
        if name in given:
            raise ConfigError(
                f"the key {name!r} stands twice in one file",
                where=f"{path}:{line}",
                got=f"once more after {given[name].where}",
                allowed="each key once",
                fix="keep the one you mean",
            )
        where = f"{path}:{line} ({name})"
        given[name] = Given(name, _yaml_values(node, flags[name], where), where)
    return given


def to_yaml(config: Config) -> str:
    """The whole config as flat YAML, one comment a section; `--config` of this text gives an equal config."""
    folder = config.output.output_dir.rstrip("/")
    again = f"--config {shlex.quote(f'{folder}/config.yaml')} --output_dir {shlex.quote(f'{folder}-again')}"
    command = f"# deepspeed launch/train.py {again}"
    lines = ["".join(letter if letter.isprintable() else "?" for letter in command)]
    run_wide: dict[str, object] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value) and not isinstance(value, type):
            purpose = (type(value).__doc__ or "").splitlines()[0]
            lines += ["", f"# {item.name}: {purpose}"]
            lines += [_yaml_entry(inner.name, getattr(value, inner.name)) for inner in fields(value)]
        else:
            run_wide[item.name] = value
    lines += ["", "# run: What the sections share."]
    lines += [_yaml_entry(name, value) for name, value in run_wide.items()]
    return "\n".join(lines) + "\n"


def describe(config: Config, deepspeed_json: Mapping[str, Any]) -> str:
    """What `--dry_run` prints: the resolved YAML, and the merged DeepSpeed JSON as its comment.

    The text is itself a file for `--config`.
    """
    merged = json.dumps(deepspeed_json, indent=2, ensure_ascii=False).splitlines()
    title = f"# {config.deepspeed}, merged with this config:"
    return to_yaml(config) + "\n".join(["", title, *(f"# {line}" for line in merged)]) + "\n"


def write_config(config: Config, path: str | Path) -> None:
    """Write `to_yaml` to `path`: the old file or the whole new one, never a part of it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, to_yaml(config).encode())


def _print_help(schema: type, prog: str) -> NoReturn:
    """Print tyro's grouped help with the field docstrings, and leave with status 0."""
    flat = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    tyro.cli(schema, args=["--help"], prog=prog, use_underscores=True, config=flat)
    raise AssertionError("tyro's --help returned")


def _assemble(schema: type[Schema], given: Mapping[str, Given], prog: str) -> Schema:
    """Type every given flag and fill the schema; an error of the schema's own checks learns its file and line."""
    table = flag_table(schema)
    missing = [flag.name for flag in table.values() if flag.required and flag.name not in given]
    if missing:
        example = f"{prog} {' '.join(f'--{name} VALUE' for name in missing)}"
        raise ConfigError(
            f"required options are missing: {', '.join(missing)}",
            where="command line and --config file",
            got=", ".join(given) or "no options",
            fix=f"{example} …" + (f", or {prog} --config FILE.yaml" if schema is Config else ""),
        )
    values = {name: _typed(table[name], item) for name, item in given.items()}
    try:
        return _build(schema, values)
    except ConfigError as error:
        source = given.get(str(error.where).removeprefix("--"))
        where = source.where if source is not None else error.where
        raise ConfigError(error.what, where=where, got=error.got, allowed=error.allowed, fix=error.fix) from None


def _build(schema: type[Schema], values: Mapping[str, object]) -> Schema:
    """Fill a schema and its sections; what is not in `values` keeps its default."""
    hints = get_type_hints(schema)
    arguments: dict[str, object] = {}
    for item in fields(cast(Any, schema)):
        if is_dataclass(hints[item.name]):
            arguments[item.name] = _build(hints[item.name], values)
        elif item.name in values:
            arguments[item.name] = values[item.name]
    return schema(**arguments)


def _typed(flag: Flag, given: Given) -> object:
    """The text of a flag as a value of its type; tyro decides.

    Raises:
        ConfigError: the text is not of that type, or there is not exactly one value where one belongs.
    """
    values = given.values
    if flag.annotation is bool:
        values = tuple(value.capitalize() if value.lower() in ("true", "false") else value for value in values)
    no_text = flag.annotation is str and values == ("None",)
    if no_text or (len(values) != 1 and not flag.takes_many):
        raise wrong_value(flag, given)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro draws a box there; ours names the file and line
            value: object = tyro.cli(flag.annotation, args=["--", *values], add_help=False, console_outputs=False)
    except SystemExit:
        raise wrong_value(flag, given) from None
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong_value(flag, given)
    return value


def _yaml_entries(path: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a YAML file, each with its line, before PyYAML gives them types."""
    try:
        text = expanded(path, "--config").read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise _no_yaml_file(path, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError("a config is UTF-8 text", where=path, got=str(error), fix="save it as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        raise ConfigError("this is not YAML", where=where, got=error.problem, allowed=_LINES) from None
    except yaml.YAMLError as error:
        raise ConfigError("this is not YAML", where=path, got=str(error), allowed=_LINES) from None
    if root is None:
        raise ConfigError("the config is empty", where=path, allowed=_LINES, fix="fill or drop it")
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("a config is a mapping", where=f"{path}:1", got=_kind_of(root), allowed=_LINES)
    return cast(list[tuple[yaml.Node, yaml.Node]], root.value)


def _yaml_values(node: yaml.Node, flag: Flag, where: str) -> tuple[str, ...]:
    """The text of a scalar or of a list's items; null is None, as on the command line."""
    items = node.value if isinstance(node, yaml.SequenceNode) and flag.takes_many else [node]
    values = []
    for item in items:
        kind = _kind_of(item)
        if kind not in ("text", "null") or (kind == "null" and flag.takes_many):
            what = f"{flag.name} cannot have this value"
            raise ConfigError(what, where=where, got=kind, allowed=flag.allowed, fix=_FLAT)
        values.append("None" if kind == "null" else str(item.value))
    return tuple(values)


def _kind_of(node: yaml.Node) -> str:
    """text, null, or what else stands there."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL_TAG:
            return "null"
        return "text" if node.tag in _PLAIN_TAGS else f"the tag {node.tag}"
    return "a list" if isinstance(node, yaml.SequenceNode) else "nested keys"


def _yaml_entry(name: str, value: object) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = "".join(str(item) for item in (plain if isinstance(plain, list) else [plain]))
    # PyYAML writes rare line breaks (U+0085, U+2028) as they are and reads them back as spaces: escape such texts.
    readable = text.replace("\n", "").isprintable()
    return yaml.safe_dump({name: plain}, allow_unicode=readable, default_flow_style=False, width=10**9).rstrip("\n")


def _no_yaml_file(path: str, error: OSError) -> ConfigError:
    beside = sorted(str(item) for item in expanded(path, "--config").parent.glob("*.yaml"))
    return ConfigError(
        "the config file cannot be read",
        where="--config",
        got=f"{path} ({error.strerror})",
        allowed=", ".join(beside) or "the path of a YAML file, from the folder you are in",
        fix="check the path; files of this repository lie in launch/configs/",
    )
