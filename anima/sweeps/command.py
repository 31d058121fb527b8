"""The words of a trial's command, as W&B's agent makes them from a sweep's `command`. Runs nothing."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from anima.errors import ConfigError
from anima.sweeps.sweep_file import Sweep

ARGS = "${args}"
PLAIN = {"${env}": ["/usr/bin/env"], "${interpreter}": ["python"]}
OTHER_ARGS = re.compile(r"\$\{args_\w+\}")
ENVVAR = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")


def as_flags(parameters: Mapping[str, Any]) -> list[str]:
    """Parameters as the agent writes them: `--key=value`, Python's text of the value."""
    return [f"--{name}={value}" for name, value in parameters.items()]


def trial_command(
    sweep: Sweep, parameters: Mapping[str, Any], environ: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """What starts a trial: the launcher with its options up to the program, and the program's flags.

    Args:
        sweep: Whose command.
        parameters: Of the trial.
        environ: Where `${envvar:NAME}` is looked up.

    Raises:
        ConfigError: the command cannot start a training.
    """
    where = sweep.at("command")
    words: list[str] = []
    front = -1
    for word in sweep.command:
        if OTHER_ARGS.fullmatch(word):
            raise ConfigError("the flags of a training are --key=value", where=where, got=word, fix=ARGS)
        if word == "${program}":
            front = len(words) + 1
            words.append(sweep.program)
        elif word == ARGS:
            words += as_flags(parameters)
        else:
            words += PLAIN.get(word, [ENVVAR.sub(lambda found: environ.get(found[1], found[1]), word)])
    if front < 0 or ARGS not in sweep.command:
        missing = ARGS if front >= 0 else "${program}"
        raise ConfigError("the command lacks a word", where=where, got=" ".join(sweep.command), fix=f"add {missing}")
    return words[:front], words[front:]


def with_flags(flags: Sequence[str], new: Mapping[str, str]) -> list[str]:
    """A command line with these flags, in place of what it says of them."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0] in new
        if not dropping:
            kept.append(word)
    return kept + [f"--{name}={value}" for name, value in new.items()]
