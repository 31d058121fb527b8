"""Look at the data before training on it, with the same --config and flags as training.

python launch/data.py check --config launch/configs/quickstart_sft.yaml     # exit 2 if training would refuse the data
python launch/data.py show --config launch/configs/quickstart_sft.yaml --rows 1 5 --html rows.html
python launch/data.py stats --config launch/configs/quickstart_sft.yaml --html lengths.html
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import ConfigFile, parse_command
from anima.config.paths import expanded
from anima.config.schema import Config
from anima.config.spelling import nearest
from anima.entry import run_command
from anima.errors import AnimaError, ConfigError

if TYPE_CHECKING:  # these take seconds to import: at run time after the command line has been parsed
    from transformers import PreTrainedTokenizerBase

    from anima.data.kinds import RecordKind
    from anima.data.templates import Template

VERBS = {
    "check": {"config", "json", "similarity", "max_near_rows"},
    "show": {"config", "html", "rows", "held_out", "boundaries", "colour"},
    "stats": {"config", "json", "html", "colour", "ranks"},
}
"""What can be done, and the flags of this program that have a meaning for it."""
PROGRAM = "launch/data.py"


@dataclass(frozen=True, kw_only=True)
class DataOptions(ConfigFile):
    """What is shown of the data."""

    json: bool = field(default=False, metadata={"bare": "True"})
    """check, stats: print JSON for machines."""
    html: str | None = None
    """show, stats: write a page to this file as well."""
    rows: tuple[str, ...] = ()
    """show: rows by their number from 1 over all files, or by place, such as data.jsonl:7; without, the first three."""
    held_out: bool = field(default=False, metadata={"bare": "True"})
    """show: rows of --eval_files instead of --train_files."""
    boundaries: bool = field(default=False, metadata={"bare": "True"})
    """show: where each token ends."""
    colour: Literal["auto", "always", "never"] = "auto"
    """Colours in the terminal; auto: if the output is one and NO_COLOR is not set."""
    similarity: float = 0.8
    """check: share of common text from which rows are near duplicates; 0 does not look for them."""
    max_near_rows: int = 200_000
    """check: rows that are compared for near duplicates."""
    ranks: int = 1
    """stats: ranks that will share a step."""

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1:
            raise ConfigError(
                "a similarity is a share", where="--similarity", got=self.similarity, allowed="0 to 1, such as 0.8"
            )
        if self.max_near_rows < 0:
            raise ConfigError(
                "a number of rows is not negative",
                where="--max_near_rows",
                got=self.max_near_rows,
                allowed="0 or more; --similarity 0 looks for no near duplicates",
            )
        if self.ranks < 1:
            raise ConfigError("nobody would train", where="--ranks", got=self.ranks, allowed="1 or more")


@dataclass(frozen=True, kw_only=True)
class _DataFlags(DataOptions, Config):
    """Look at the data as training would see it: check, show or stats, then the flags of training and these."""


def main(argv: Sequence[str]) -> None:
    """Parse, then do what the verb says."""
    verb = argv[0] if argv else ""
    if verb not in (*VERBS, "--help", "-h"):
        guess = nearest(verb, VERBS) if verb else None
        raise ConfigError(
            "the first word says what to do" + (f"; did you mean {guess}?" if guess else ""),
            where="command line",
            got=repr(verb) if verb else "nothing",
            allowed=", ".join(VERBS),
            fix=f"{PROGRAM} {guess or 'check'} --config FILE.yaml",
        )
    rest = argv[1:] if verb in VERBS else argv
    spare = {"output_dir": "not-used"}
    config, options = parse_command(_DataFlags, DataOptions, rest, prog=f"{PROGRAM} {'|'.join(VERBS)}", spare=spare)
    for item in fields(options):
        if verb in VERBS and item.name not in VERBS[verb] and getattr(options, item.name) != item.default:
            users = " and ".join(name for name, flags in VERBS.items() if item.name in flags)
            raise ConfigError(f"--{item.name} means nothing to {verb}", where=f"--{item.name}", allowed=f"with {users}")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    tokenizer, template = load(config)
    if verb == "check":
        check(config, options, tokenizer, template)
    elif verb == "show":
        show(config, options, tokenizer, template)
    else:
        stats(config, options, tokenizer, template)


def load(config: Config) -> tuple[PreTrainedTokenizerBase, Template]:
    """The tokenizer and the template of the run."""
    from anima.data.templates import make_template
    from anima.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    masked = config.data.train_on == "assistant"
    return tokenizer, make_template(config.data.chat_template, tokenizer, mask_answers=masked)


def records_of(config: Config) -> RecordKind[Any]:
    """What a row of the data is, by the objective."""
    from anima.data.kinds import CONVERSATIONS, PAIRS

    return PAIRS if config.objective == "dpo" else CONVERSATIONS


def check(config: Config, options: DataOptions, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Print everything that is wrong or odd; exit 2 if training would refuse the data."""
    from anima.inspection.check import CheckOptions
    from anima.inspection.check import check as check_data

    looked_for = CheckOptions(similarity=options.similarity, max_near_rows=options.max_near_rows)
    report = check_data(records_of(config), config.data, tokenizer, template, seed=config.seed, options=looked_for)
    if options.json:
        print(json.dumps(report.to_json(), ensure_ascii=False, indent=1))
    else:
        print("\n".join(report.lines()))
    if report.refusal is not None:
        sys.exit(AnimaError.exit_code)


def show(config: Config, options: DataOptions, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Print single rows as training sees them, and write them as a page."""
    from anima.evaluation.lines import write_whole
    from anima.inspection.pages import samples_page
    from anima.inspection.samples import SampleReader
    from anima.inspection.terminal import Painter, legend, sample_lines

    files = config.data.eval_files if options.held_out else config.data.train_files
    if not files:
        raise ConfigError(
            "there are no held-out files",
            where="--held_out",
            fix="name them with --eval_files; what --eval_size holds out is shown without --held_out",
        )
    lenient = replace(config.data, bad_rows="drop", truncation=_not_error(config))
    reader = SampleReader(records_of(config), lenient, tokenizer, template)
    samples = reader.read("eval_files" if options.held_out else "train_files", options.rows)
    paint = Painter(_colours(options))
    print(legend(paint))
    for sample in samples:
        print("", *sample_lines(sample, paint, boundaries=options.boundaries), sep="\n")
    if options.html is not None:
        title = f"{len(samples)} rows of {', '.join(files)}"
        note = f"template {template.name}, tokenizer of {config.model.model_name_or_path}"
        page = samples_page(samples, title=title, note=note, boundaries=options.boundaries)
        write_whole(expanded(options.html, "--html"), page)
        print(f"\nwritten: {options.html}")


def stats(config: Config, options: DataOptions, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Print lengths, shares and steps, and write them as a page."""
    from anima.data.prepare import prepare_records, tokenise
    from anima.evaluation.lines import write_whole
    from anima.inspection.pages import stats_page
    from anima.inspection.stats import measure
    from anima.inspection.terminal import Painter, stats_lines

    kind, data, notes = records_of(config), config.data, [f"template {template.name}"]
    try:
        prepared = prepare_records(kind, data, tokenizer, seed=config.seed, template=template)
    except AnimaError as error:
        data = replace(data, bad_rows="drop", truncation=_not_error(config))
        prepared = prepare_records(kind, data, tokenizer, seed=config.seed, template=template)
        notes.append(f"training would stop: {error.what} ({error.where}); the figures leave such rows out")
    whole = tokenise(kind, data, tokenizer, template)[0]
    found = measure(
        prepared.train,
        whole.lengths(),
        whole.report,
        data,
        config.batch,
        unit=kind.name,
        seed=config.seed,
        ranks=options.ranks,
    )
    notes += [*whole.report.lines(), *prepared.report.mixture, *prepared.report.notes]
    if options.json:
        print(json.dumps(found.to_json() | {"notes": notes}, ensure_ascii=False, indent=1))
    else:
        print("\n".join([*notes, "", *stats_lines(found, Painter(_colours(options)))]))
    if options.html is not None:
        title = f"Lengths of {', '.join(config.data.train_files)}"
        write_whole(expanded(options.html, "--html"), stats_page(found, title=title, notes=notes))
        print(f"written: {options.html}", file=sys.stderr if options.json else sys.stdout)


def _not_error(config: Config) -> Literal["drop", "trim_prompt"]:
    """The truncation that goes on after a row that is too long."""
    return "trim_prompt" if config.data.truncation == "trim_prompt" else "drop"


def _colours(options: DataOptions) -> bool:
    if options.colour == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return options.colour == "always"


if __name__ == "__main__":
    run_command(main)
