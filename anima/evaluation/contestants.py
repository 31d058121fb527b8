"""Who takes part: adapters, bases and files of answers from the command line, or the usual ones of training runs.

Knows folders and names, no model.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from anima.config.paths import expanded
from anima.errors import ConfigError, DataError
from anima.inference.adapter_folder import AdapterRecord, read_record

Kind = Literal["adapter", "base", "file"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SPELLINGS = "NAME=ADAPTER_FOLDER, base:NAME=MODEL_FOLDER, file:NAME=ANSWERS.jsonl"


@dataclass(frozen=True)
class Contestant:
    """A source of answers.

    Attributes:
        name: As in all tables; also the name of its file.
        kind: An adapter's folder, a model's folder or hub name, or a file with answers made elsewhere.
        path: Where it lies.
        prefix: Text before every question that only this contestant gets; tables say so.
        quantization: Of a base: nf4 or none; an adapter's is that of its training.
    """

    name: str
    kind: Kind
    path: str
    prefix: str = ""
    quantization: Literal["nf4", "none"] = "nf4"


def parse_contestants(specs: Sequence[str], quantization: Literal["nf4", "none"]) -> list[Contestant]:
    """Contestants of the command line.

    Args:
        specs: `NAME=PATH`, `base:NAME=PATH` or `file:NAME=PATH`.
        quantization: Of bases.

    Raises:
        ConfigError: wrong spelling.
    """
    contestants = []
    for spec in specs:
        front, equals, path = spec.partition("=")
        kind, colon, name = front.rpartition(":")
        if not equals or not path or not NAME.fullmatch(name) or (colon and kind not in ("base", "file")):
            raise ConfigError("this is no contestant", where="--contestants", got=repr(spec), allowed=SPELLINGS)
        found: Kind = "base" if kind == "base" else "file" if kind == "file" else "adapter"
        contestants.append(Contestant(name, found, path, quantization=quantization))
    return contestants


def with_prefixes(contestants: Sequence[Contestant], prefixes: Sequence[str]) -> list[Contestant]:
    """The same contestants with their prefixes, every name once.

    Args:
        contestants: All that take part.
        prefixes: `NAME=TEXT`.

    Raises:
        ConfigError: a name given twice; wrong spelling, a name that does not take part, a file of answers, which asks
            nothing.
    """
    kinds = {contestant.name: contestant.kind for contestant in contestants}
    if len(kinds) < len(contestants):
        names = [contestant.name for contestant in contestants]
        raise ConfigError(
            "two contestants have one name",
            where="--contestants and --run",
            got=", ".join(sorted({name for name in names if names.count(name) > 1})),
            fix="name one of them otherwise",
        )
    texts: dict[str, str] = {}
    for prefix in prefixes:
        name, equals, text = prefix.partition("=")
        if not equals or kinds.get(name, "file") == "file":
            raise ConfigError(
                "this prefix belongs to no contestant that is asked here",
                where="--prefix",
                got=repr(prefix),
                allowed=f"NAME=TEXT with a name of {', '.join(n for n, kind in kinds.items() if kind != 'file')}",
            )
        texts[name] = text
    return [Contestant(c.name, c.kind, c.path, texts.get(c.name, ""), c.quantization) for c in contestants]


def contestants_of_runs(runs: Sequence[str], previous: str | None) -> list[Contestant]:
    """The usual contestants of training runs: their base, every run's adapter (sft, dpo), the previous best.

    Args:
        runs: Run folders.
        previous: Folder of an earlier arena, whose best rated adapter takes part as `previous-best`; or None.

    Raises:
        ModelError: a folder that is no finished run.
        DataError: an earlier arena without ratings or adapters.
    """
    adapters: list[Contestant] = []
    bases: dict[tuple[str, str], Contestant] = {}
    records = [(expanded(run), read_record(expanded(run) / "adapter")) for run in runs]
    objectives = [record.objective for _, record in records]
    for folder, record in records:
        alone = objectives.count(record.objective) == 1
        name = record.objective if alone else f"{record.objective}-{folder.resolve().name}"
        adapters.append(Contestant(name, "adapter", str(folder / "adapter")))
        identity = (record.model_name_or_path, record.quantization)
        bases.setdefault(identity, _base_of(record, "base" if not bases else f"base-{len(bases) + 1}"))
    contestants = [*bases.values(), *adapters]
    if previous is not None:
        best = _previous_best(expanded(previous))
        if best not in [contestant.path for contestant in adapters]:
            contestants.append(Contestant("previous-best", "adapter", best))
    return contestants


def _base_of(record: AdapterRecord, name: str) -> Contestant:
    return Contestant(name, "base", record.model_name_or_path, "", "nf4" if record.quantization == "nf4" else "none")


def _previous_best(arena: Path) -> str:
    """Path of the best rated adapter of an earlier arena."""
    path = arena / "ratings.json"
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        ranked = sorted(table["ratings"].items(), key=lambda item: -item[1])
        kinds = {entry["name"]: (entry["kind"], entry["path"]) for entry in table["contestants"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "the earlier arena has no ratings", where=path, got=f"{type(error).__name__}: {error}", fix="rate it first"
        ) from None
    for name, _ in ranked:
        kind, place = kinds.get(name, ("file", ""))
        if kind == "adapter":
            return str(place)
    raise DataError("no adapter took part in the earlier arena", where=path, got=", ".join(kinds))
