"""A tournament of models: answers -> verdicts of a judge -> ratings with intervals -> a report. Each verb resumes.

python launch/arena.py answers --arena runs/arena --questions launch/data/arena_questions.jsonl --run runs/sft runs/dpo
python launch/arena.py judge --arena runs/arena --judge_model NAME --base_url http://127.0.0.1:8000/v1
python launch/arena.py rate --arena runs/arena
python launch/arena.py report --arena runs/arena
python launch/arena.py translate --arena runs/arena --questions FILE --output zh.json --judge_model NAME
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.cli import parse_flags
from anima.config.paths import expanded
from anima.config.spelling import nearest
from anima.entry import run_command
from anima.errors import ConfigError
from anima.evaluation.options import (
    AnswersOptions,
    JudgeOptions,
    RateOptions,
    ReportOptions,
    TranslateOptions,
)
from anima.evaluation.progress import Progress
from anima.tracking.terminal import warn

if TYPE_CHECKING:
    from anima.evaluation.cost import Price
    from anima.evaluation.prompts import Prompts
    from anima.evaluation.tournament import State
    from anima.evaluation.verdicts import Call


def main(argv: Sequence[str]) -> None:
    """Run one verb."""
    verb = argv[0] if argv else ""
    if verb in ("-h", "--help"):
        print(f"{__doc__}\nlaunch/arena.py VERB --help lists the flags of a verb: {', '.join(VERBS)}")
        return
    if verb not in VERBS:
        guess = nearest(verb, VERBS)
        raise ConfigError(
            f"there is no verb {verb!r}" if verb else "which verb?",
            where="launch/arena.py",
            allowed=", ".join(VERBS),
            fix=f"launch/arena.py {guess or 'answers'} --help",
        )
    VERBS[verb](argv[1:])


def answers(argv: Sequence[str]) -> None:
    """Every contestant's missing answers; everything that can be refused is refused before a model is loaded."""
    options = parse_flags(AnswersOptions, argv, prog="launch/arena.py answers")
    import torch

    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    from anima.evaluation.answerers import check_contestant, load_contestant
    from anima.evaluation.answers import answer_questions, missing_questions
    from anima.evaluation.contestants import contestants_of_runs, parse_contestants, with_prefixes
    from anima.evaluation.questions import read_questions

    arena, field, limit = expanded(options.arena, "--arena"), options.question_field, options.max_new_tokens
    questions = read_questions(options.questions, field)[: options.num_questions]
    given = parse_contestants(options.contestants, options.quantization)
    contestants = with_prefixes([*contestants_of_runs(options.run, options.previous), *given], options.prefix)
    if not contestants:
        raise ConfigError("nobody takes part", where="--contestants or --run", fix="--run runs/sft runs/dpo")
    if len({contestant.prefix for contestant in contestants}) > 1:
        warn("not every contestant gets the same words (--prefix); the tables say so")
    for contestant in contestants:
        missing_questions(arena, contestant, questions, field, limit)
        check_contestant(contestant, questions, field)
    for contestant in contestants:
        missing = missing_questions(arena, contestant, questions, field, limit)
        print(f"{contestant.name}: {len(questions) - len(missing)} of {len(questions)} answered", flush=True)
        if missing:
            answer_questions(
                arena,
                contestant,
                missing,
                field,
                limit,
                load_contestant(contestant, questions, field, device=options.device, max_new_tokens=limit),
                batch_size=options.batch_size,
                on_batch=Progress(len(missing), "answered").reach,
            )
            gc.collect()  # the model holds itself in circles; two do not fit


def judge(argv: Sequence[str]) -> None:
    """Estimate, judge what is missing in rounds, account."""
    from anima.evaluation.cost import Price, account
    from anima.evaluation.judge import EndpointJudge
    from anima.evaluation.prompts import load_prompts
    from anima.evaluation.tournament import load_state
    from anima.evaluation.verdicts import judge_calls

    options = parse_flags(JudgeOptions, argv, prog="launch/arena.py judge")
    endpoint = options.endpoint.endpoint(os.environ, options.seed)
    arena, prompts = expanded(options.arena, "--arena"), load_prompts(options.judge_prompts)
    price = Price(options.endpoint.price_input, options.endpoint.price_output)
    asked = EndpointJudge(endpoint)
    while calls := due_calls(options, state := load_state(arena), prompts, endpoint.model, price):
        if options.dry_run:
            return
        judge_calls(
            arena,
            calls,
            state.answers,
            endpoint.model,
            asked.ask,
            concurrency=options.endpoint.concurrency,
            on_reply=Progress(len({call.key for call in calls}), "judged").read,
        )
    print(account(state.stored, price).line())


def due_calls(options: JudgeOptions, state: State, prompts: Prompts, model: str, price: Price) -> list[Call]:
    """What is to be asked now, announced with its price.

    Raises:
        ConfigError: with what was spent it may cost more than --max_cost.
    """
    from anima.evaluation.cost import account, estimate
    from anima.evaluation.tournament import due_battles
    from anima.evaluation.verdicts import missing_calls, plan_calls

    battles = due_battles(
        state,
        model,
        options.schedule,
        battles_per_pair=options.battles_per_pair,
        battles_per_round=options.battles_per_round,
        max_battles=options.max_battles,
        seed=options.seed,
    )
    calls = plan_calls(battles, state.answers, prompts, model)
    missing = missing_calls(calls, state.verdicts, model)
    expected, spent = estimate(missing, options.endpoint.max_tokens, price), account(state.stored, price).cost
    print(f"{len(battles):,} battles in both orders, {len(calls) - len(missing):,} verdicts there; {expected.line()}")
    if options.max_cost is not None and missing and spent + expected.highest_cost > options.max_cost:
        raise ConfigError(
            "this may cost more than allowed",
            where="--max_cost",
            got=f"{spent:.2f} spent, at most {expected.highest_cost:.2f} to come",
            allowed=f"{options.max_cost:.2f} in all",
            fix="raise it, lower --max_tokens, or --schedule balanced --battles_per_pair with fewer battles",
        )
    return missing


def rate(argv: Sequence[str]) -> None:
    """Ratings of an arena or of a file of matches."""
    from anima.evaluation import tournament
    from anima.evaluation.elo import EloScale
    from anima.evaluation.lines import write_whole
    from anima.evaluation.matches import merge_orders, paired, read_matches
    from anima.evaluation.ratings import RatingSettings, describe_judging
    from anima.evaluation.ratings import rate as rate_matches
    from anima.evaluation.table import judging_lines, rating_lines
    from anima.evaluation.tournament import contestant_rows, judged_matches, load_state, mixed_prompts

    options = parse_flags(RateOptions, argv, prog="launch/arena.py rate")
    settings = RatingSettings(
        scale=EloScale(options.k, options.scale, options.base, options.start),
        start_ratings=options.started(),
        num_orderings=options.num_orderings,
        num_bootstrap=options.num_bootstrap,
        seed=options.seed,
        verdicts_per_battle=2 if options.arena is not None and options.orders == "separate" else 1,
    )
    arena = expanded(options.arena, "--arena") if options.arena is not None else None
    known: dict[str, Any] = {}
    if arena is not None:
        state = load_state(arena)
        verdicts = judged_matches(state, options.judge)
        if mixed := mixed_prompts(state):
            warn(f"some battles still have verdicts of an earlier judge prompt: {', '.join(mixed)}")
        known = {
            "contestants": contestant_rows(state.files),
            "num_verdicts": len(state.verdicts),
            "num_unparsable": sum(verdict.reading.outcome is None for verdict in state.verdicts),
            "num_outdated": state.num_outdated,
        }
    else:
        verdicts = [match for match in read_matches(str(options.matches)) if options.judge in (None, match.judge)]
    battles = merge_orders(verdicts)
    matches = verdicts
    if options.orders == "merged":
        matches = battles
    elif arena is not None:
        matches = [match for pair in paired(verdicts) for match in pair]
    counted = battles if arena is not None else matches
    document = rate_matches(matches, options.method, settings) | describe_judging(counted, verdicts) | known
    document["orders"] = options.orders
    text = json.dumps(document, ensure_ascii=False, indent=1) + "\n"
    if arena is not None:
        write_whole(arena / tournament.RATINGS, text)
        lines = (json.dumps(match.to_json(), ensure_ascii=False) for match in matches)
        write_whole(arena / tournament.MATCHES, "\n".join(lines) + "\n")
    if options.json is not None:
        write_whole(expanded(options.json, "--json"), text)
    print("\n".join([*rating_lines(document), *judging_lines(document)]))


def report(argv: Sequence[str]) -> None:
    """Ratings on the terminal, everything as a page."""
    from anima.evaluation import tournament
    from anima.evaluation.cost import Price, account
    from anima.evaluation.lines import write_whole
    from anima.evaluation.page import report_page
    from anima.evaluation.table import judging_lines, rating_lines
    from anima.evaluation.tournament import load_state, read_ratings

    options = parse_flags(ReportOptions, argv, prog="launch/arena.py report")
    arena = expanded(options.arena, "--arena")
    state, document = load_state(arena), read_ratings(arena)
    if document["num_verdicts"] != len(state.verdicts):
        print(
            "warning: verdicts came in after the ratings: launch/arena.py rate brings them up to date", file=sys.stderr
        )
    spent = account(state.stored, Price(options.price_input, options.price_output)).line()
    page = expanded(options.html, "--html") if options.html is not None else arena / tournament.REPORT
    write_whole(page, report_page(document, state.verdicts, state.answers, [spent]))
    print("\n".join([*rating_lines(document), *judging_lines(document), "", spent, f"page: {page}"]))


def translate(argv: Sequence[str]) -> None:
    """A question set with translations."""
    from anima.evaluation.cost import Price
    from anima.evaluation.judge import EndpointJudge
    from anima.evaluation.lines import write_whole
    from anima.evaluation.questions import format_questions, read_questions
    from anima.evaluation.translate import translate_questions

    options = parse_flags(TranslateOptions, argv, prog="launch/arena.py translate")
    endpoint = options.endpoint.endpoint(os.environ, options.seed)
    questions = read_questions(options.questions)
    arena, output = expanded(options.arena, "--arena"), expanded(options.output, "--output")
    spent = [0, 0]

    def count(prompt_tokens: int, completion_tokens: int) -> None:
        spent[0] += prompt_tokens
        spent[1] += completion_tokens

    translated = translate_questions(
        arena,
        questions,
        options.language,
        endpoint.model,
        EndpointJudge(endpoint).ask,
        concurrency=options.endpoint.concurrency,
        on_reply=lambda reply: count(reply.prompt_tokens, reply.completion_tokens),
    )
    write_whole(output, format_questions(translated) + "\n")
    cost = Price(options.endpoint.price_input, options.endpoint.price_output).of(*spent)
    print(f"{options.output}: {len(translated)} of {len(questions)} questions translated; this run {cost:.2f}")
    if len(translated) < len(questions):
        warn("some translations came back empty or cut off at --max_tokens: the same command asks for them again")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "answers": answers,
    "judge": judge,
    "rate": rate,
    "report": report,
    "translate": translate,
}

if __name__ == "__main__":
    run_command(main)
