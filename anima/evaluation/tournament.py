"""The state of a tournament, read from its folder, and what is to be done next. Asks nobody.

Everything follows from the files: a process that was killed goes on where the files end.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from anima.errors import ConfigError, DataError
from anima.evaluation.adaptive import next_battles, open_pairs
from anima.evaluation.answers import Answered, AnswerFile, read_all_answers
from anima.evaluation.matches import Match, paired
from anima.evaluation.schedule import Battle, all_battles, balanced_battles
from anima.evaluation.verdicts import Verdict, current_verdicts, read_verdicts, verdict_matches

RATINGS, MATCHES, REPORT = "ratings.json", "matches.jsonl", "report.html"
Schedule = Literal["all", "balanced", "adaptive"]


@dataclass(frozen=True)
class State:
    """Answers and the verdicts on them, as they are now.

    Attributes:
        files: Contestants with answers.
        verdicts: Verdicts on these answers.
        num_outdated: Stored verdicts on answers that have changed since.
        stored: All stored verdicts, outdated ones too.
    """

    files: tuple[AnswerFile, ...]
    verdicts: tuple[Verdict, ...]
    num_outdated: int
    stored: tuple[Verdict, ...]

    @functools.cached_property
    def answers(self) -> dict[str, dict[str, Answered]]:
        """Answer by contestant and question."""
        return {file.name: file.answers for file in self.files}

    @functools.cached_property
    def category_of(self) -> dict[str, str]:
        """Category by question."""
        return {answered.question_id: answered.category for file in self.files for answered in file.answers.values()}

    def battles_of(self, judge: str) -> list[Battle]:
        """Battles of which this judge has judged at least one order."""
        battles = set()
        for verdict in self.verdicts:
            if verdict.judge == judge:
                one, other = sorted((verdict.first, verdict.second))
                battles.add(Battle(verdict.question_id, one, other))
        return sorted(battles)


def load_state(arena: Path) -> State:
    """Read a tournament's folder.

    Raises:
        ConfigError: there is no answer in it.
        DataError: contestants were asked the same question in different words; a line is broken.
    """
    files = tuple(read_all_answers(arena))
    if not files:
        raise ConfigError(
            "nobody has answered yet", where=f"--arena {arena}", fix="launch/arena.py answers --arena …, first"
        )
    _check_same_questions(files)
    answers = {file.name: file.answers for file in files}
    stored = read_verdicts(arena)
    current = current_verdicts(stored, answers)
    outdated = len({(v.question_id, v.first, v.second, v.judge) for v in stored}) - len(current)
    return State(files, tuple(current), outdated, tuple(stored))


def due_battles(
    state: State,
    judge: str,
    schedule: Schedule,
    *,
    battles_per_pair: int,
    battles_per_round: int,
    max_battles: int | None,
    seed: int,
) -> list[Battle]:
    """Battles to judge before asking again; those begun come first, and what is judged already may be among them.

    Args:
        state: What there is.
        judge: Whose verdicts count.
        schedule: All; balanced; or adaptive: balanced, then rounds between neighbours that are not told apart.
        battles_per_pair: Of a balanced schedule, and of an adaptive one's start.
        battles_per_round: Of a pair in one round of an adaptive schedule.
        max_battles: Where an adaptive schedule stops.
        seed: Of the private generators.
    """
    if schedule == "all":
        return all_battles(state.answers)
    begun = state.battles_of(judge)
    due = [*begun, *balanced_battles(state.answers, state.category_of, battles_per_pair, seed, begun)]
    if schedule == "balanced":
        return due
    half_done = 2 * len(begun) - sum(verdict.judge == judge for verdict in state.verdicts)
    if len(due) == len(begun) and not half_done:
        matches = [match for pair in paired(judged_matches(state, judge)) for match in pair]
        pairs = open_pairs(matches, seed) if matches else []
        due += next_battles(pairs, state.answers, state.category_of, begun, per_round=battles_per_round, seed=seed)
    return due if max_battles is None else due[: max(max_battles, len(begun))]


def judged_matches(state: State, judge: str | None) -> list[Match]:
    """One match for every readable verdict of this judge, or of all.

    Raises:
        DataError: nobody judged by that name, or no verdict is readable.
    """
    chosen = [verdict for verdict in state.verdicts if judge in (None, verdict.judge)]
    if not chosen:
        names = sorted({verdict.judge for verdict in state.verdicts})
        raise DataError(
            "there is no verdict to rate",
            where="--judge" if judge else "verdicts.jsonl",
            got=judge,
            allowed=", ".join(names) or None,
            fix="launch/arena.py judge makes some",
        )
    matches = verdict_matches(chosen, state.answers)
    if not matches:
        raise DataError(
            f"none of the {len(chosen)} verdicts can be read",
            where="verdicts.jsonl",
            got=repr(chosen[-1].text[-80:]),
            allowed="what the judge's prompt asks for, such as a last line of 1, 2 or 3",
            fix="judge with a stronger model, more --max_tokens or other --judge_prompts",
        )
    return matches


def mixed_prompts(state: State) -> list[str]:
    """`judge (category)` wherever one judge's verdicts in one category were asked for in different words."""
    asked: dict[tuple[str, str], set[str]] = {}
    for verdict in state.verdicts:
        asked.setdefault((verdict.judge, verdict.category), set()).add(verdict.prompt)
    return [f"{judge} ({category})" for (judge, category), prompts in sorted(asked.items()) if len(prompts) > 1]


def contestant_rows(files: Sequence[AnswerFile]) -> list[Mapping[str, object]]:
    """Who took part and how, for tables."""
    return [{**file.contestant, "num_answers": len(file.answers)} for file in files]


def read_ratings(arena: Path) -> dict[str, Any]:
    """What `rate` wrote with Bradley-Terry's ratings.

    Raises:
        DataError: there is nothing of the kind.
    """
    path = arena / RATINGS
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        got = f"method {document['method']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        document, got = {}, f"{type(error).__name__}: {error}"
    if document.get("method") not in ("all", "bradley_terry"):
        raise DataError(
            "there are no ratings to report", where=path, got=got, fix="launch/arena.py rate --arena …, first"
        )
    return document


def _check_same_questions(files: Sequence[AnswerFile]) -> None:
    """Every question in the same words for everybody."""
    asked: dict[str, tuple[str, Answered]] = {}
    for file in files:
        for question, answered in file.answers.items():
            before, words = asked.setdefault(question, (file.name, answered))
            if (words.question, words.category) != (answered.question, answered.category):
                raise DataError(
                    f"{before!r} and {file.name!r} were asked different questions under one id",
                    where=f"question {question}",
                    got=str(asdict(answered))[:100],
                    allowed=str(asdict(words))[:100],
                    fix="use one arena folder for one question set, asked in one language",
                )
