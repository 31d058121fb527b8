"""Numbers about models: what is asked for, made for one speaker after the other, kept in one JSON, shown as a table."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from anima.config.schema import DataConfig
from anima.data.loader import EvalLoader
from anima.data.prepare import prepare
from anima.data.records import Message
from anima.data.sources import resolve
from anima.data.templates import make_template
from anima.errors import DataError
from anima.evaluation.answers import answer_questions, missing_questions
from anima.evaluation.contestants import Contestant, Kind
from anima.evaluation.harness import check_harness, run_harness
from anima.evaluation.lines import check_writable, write_whole
from anima.evaluation.measurements import Measurements
from anima.evaluation.mmlu import Choice, ChoiceEncoder, few_shot, read_choices, spread
from anima.evaluation.questions import Question, read_questions
from anima.evaluation.scoring import Scored, benchmark, held_out_loss
from anima.inference.chat import BASE, Speakers

RESULTS = "results.json"
Numbers = dict[str, dict[str, float]]
"""Metrics by measurement, such as {"held_out": {"loss": 2.1}}."""


def check_measurements(wanted: Measurements, output_dir: Path) -> None:
    """Find the held-out files, read all others and ask the harness, before a model is loaded.

    Raises:
        DataError: a file that cannot be used, or earlier results that cannot be read.
        ConfigError: the folder cannot be written; the harness is asked for and absent, or knows no such task.
    """
    check_writable(output_dir)
    resolve(wanted.eval_files, "eval_files", weights=False)
    for path in wanted.mmlu_files:
        choices_of(wanted, path)
    if wanted.questions is not None:
        read_questions(wanted.questions)
    if wanted.lm_eval_tasks:
        check_harness(wanted.lm_eval_tasks, wanted.lm_eval_include)
    read_numbers(output_dir)


def choices_of(wanted: Measurements, path: str) -> list[Choice]:
    """The questions of a file, thinned and with their examples."""
    choices = spread(read_choices(path), wanted.mmlu_questions)
    return few_shot(choices, read_choices(wanted.mmlu_examples), wanted.mmlu_shots) if wanted.mmlu_examples else choices


def measure(
    speakers: Speakers, name: str, wanted: Measurements, output_dir: Path, tell: Callable[[str], None]
) -> Numbers:
    """All measurements of one speaker; answers that were made before are kept.

    Raises:
        ConfigError: answers that were made before were made in another way.
        DataError: a question's words have changed since, or a held-out row cannot be used.
    """
    # Answers come first: what they may be refused for must not cost hours of other measurements.
    answers = _answers(speakers, name, wanted, output_dir, tell) if wanted.questions is not None else None
    numbers: Numbers = {}
    if wanted.eval_files:
        numbers["held_out"] = _held_out(speakers, name, wanted)
        tell(f"{name}: held-out loss {numbers['held_out']['loss']:.4f}")
    for path in wanted.mmlu_files:
        with speakers.network(name) as (model, tokenizer):
            encoder = ChoiceEncoder(tokenizer, wanted.mmlu_max_tokens)
            key = Path(path).stem + (f"+{wanted.mmlu_shots}shot" if wanted.mmlu_examples else "")
            found = benchmark(Scored(model), choices_of(wanted, path), encoder, batch_tokens=wanted.micro_batch_tokens)
        numbers[key] = found
        tell(f"{name}: {key} accuracy {found['accuracy']:.4f} of {found['questions']:.0f}")
    if wanted.lm_eval_tasks:
        with speakers.network(name) as (model, tokenizer):
            numbers |= run_harness(
                model,
                tokenizer,
                wanted.lm_eval_tasks,
                include_path=wanted.lm_eval_include,
                num_fewshot=wanted.lm_eval_shots,
                limit=wanted.lm_eval_limit,
                batch_size=wanted.batch_size,
            )
    if answers is not None:
        numbers["answers"] = answers
    return numbers


def _held_out(speakers: Speakers, name: str, wanted: Measurements) -> dict[str, float]:
    config = DataConfig(train_files=wanted.eval_files, max_seq_length=wanted.max_seq_length)
    with speakers.network(name) as (model, tokenizer):
        # Of every answer of a conversation, as in training; the speaker's own template tells only the last one apart.
        template = make_template(speakers.template(name).name, tokenizer)  # type: ignore[arg-type]  # a known name
        prepared = prepare(config, tokenizer, seed=0, template=template)
        loader = EvalLoader(
            prepared.train,
            micro_batch_tokens=max(wanted.micro_batch_tokens, wanted.max_seq_length),
            packing=True,
            rank=0,
            world_size=1,
        )
        dropped = sum(tally.rows for tally in prepared.report.train.dropped.values())
        return {**held_out_loss(Scored(model), loader), "dropped": float(dropped)}


def _answers(
    speakers: Speakers, name: str, wanted: Measurements, output_dir: Path, tell: Callable[[str], None]
) -> dict[str, float]:
    questions: list[Question] = read_questions(str(wanted.questions))[: wanted.num_questions]
    kind: Kind = "base" if name == BASE else "adapter"
    contestant = Contestant(name, kind, speakers.identity(name), quantization=speakers.quantization)
    missing = missing_questions(output_dir, contestant, questions, "text", wanted.max_new_tokens)

    def answer(prompts: Sequence[str]) -> list[str]:
        asked = [[Message("user", prompt)] for prompt in prompts]
        return speakers.answer(name, asked, max_new_tokens=wanted.max_new_tokens)

    answer_questions(
        output_dir,
        contestant,
        missing,
        "text",
        wanted.max_new_tokens,
        answer,
        batch_size=wanted.batch_size,
        on_batch=lambda done: tell(f"{name}: {done} of {len(missing)} answered"),
    )
    return {"answered": float(len(questions)), "made_now": float(len(missing))}


def read_numbers(output_dir: Path) -> dict[str, Numbers]:
    """What earlier calls measured, by model.

    Raises:
        DataError: the file holds something else.
    """
    path = output_dir / RESULTS
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): dict(numbers) for name, numbers in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            "earlier results cannot be read",
            where=path,
            got=f"{type(error).__name__}: {error}",
            fix="remove this file, or choose another --output_dir",
        ) from None


def write_numbers(output_dir: Path, numbers: dict[str, Numbers]) -> None:
    """All that is known, in one JSON; measurements of earlier calls stay unless they were made again."""
    before = read_numbers(output_dir)
    together = {name: {**before.get(name, {}), **numbers.get(name, {})} for name in dict.fromkeys([*before, *numbers])}
    write_whole(output_dir / RESULTS, json.dumps(together, indent=1, ensure_ascii=False) + "\n")


def number_lines(numbers: dict[str, Numbers]) -> list[str]:
    """A table: a row a metric, a column a model; the subjects of a benchmark are in the JSON only."""
    names = list(numbers)
    keys = dict.fromkeys(
        (measured, metric)
        for found in numbers.values()
        for measured, metrics in found.items()
        for metric in metrics
        if "/" not in metric and metric not in ("made_now",)
    )
    width = max(12, *(len(name) + 2 for name in names))
    label = max([len(f"{measured} {metric}") for measured, metric in keys], default=10) + 2
    lines = [" " * label + "".join(f"{name:>{width}}" for name in names)]
    for measured, metric in keys:
        values = [numbers[name].get(measured, {}).get(metric) for name in names]
        cells = "".join(f"{'' if value is None else _short(value):>{width}}" for value in values)
        lines.append(f"{f'{measured} {metric}':<{label}}{cells}")
    return lines


def _short(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4f}"
