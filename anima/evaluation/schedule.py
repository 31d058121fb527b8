"""Which battles are fought: all, or a balanced sample. Every battle is judged in both orders, whatever the schedule.

Knows names and question ids only; the same arguments give the same battles.
"""

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from anima.errors import ConfigError


@dataclass(frozen=True, slots=True, order=True)
class Battle:
    """Two contestants, in alphabetical order, on one question."""

    question_id: str
    one: str
    other: str


def all_battles(questions: Mapping[str, Collection[str]]) -> list[Battle]:
    """Every pair on every question that both answered.

    Args:
        questions: Ids of the answered questions by contestant.

    Raises:
        ConfigError: fewer than two contestants.
    """
    battles = [
        Battle(question, one, other)
        for one, other in _pairs(questions)
        for question in sorted(set(questions[one]) & set(questions[other]))
    ]
    # Question by question: a run that is stopped early has met all pairs equally often.
    return sorted(battles)


def balanced_battles(
    questions: Mapping[str, Collection[str]],
    category_of: Mapping[str, str],
    battles_per_pair: int,
    seed: int,
    done: Collection[Battle] = (),
) -> list[Battle]:
    """The same number of battles for every pair, spread evenly over categories and over questions.

    Args:
        questions: Ids of the answered questions by contestant.
        category_of: Category by question id.
        battles_per_pair: How many each pair fights, as far as there are questions.
        seed: Of the private generator.
        done: Battles that count towards the number and are not returned.
    """
    wanted: list[Battle] = []
    used: dict[str, int] = {}
    for battle in done:
        used[battle.question_id] = used.get(battle.question_id, 0) + 1
    for one, other in _pairs(questions):
        fought = {battle.question_id for battle in done if (battle.one, battle.other) == (one, other)}
        free = (set(questions[one]) & set(questions[other])) - fought
        chosen = spread_questions(free, category_of, used, battles_per_pair - len(fought), f"{seed}/{one}/{other}")
        for question in chosen:
            used[question] = used.get(question, 0) + 1
            wanted.append(Battle(question, one, other))
    return wanted


def spread_questions(
    free: Collection[str], category_of: Mapping[str, str], used: Mapping[str, int], count: int, seed: str
) -> list[str]:
    """Up to `count` of the free questions: categories in turn, the least used first; of each its least used question.

    Args:
        free: Question ids to choose from.
        category_of: Category by question id.
        used: How often each question was used already.
        count: How many are wanted.
        seed: Breaks ties.
    """
    generator = random.Random(seed)
    by_category: dict[str, list[str]] = {}
    for question in sorted(free):
        by_category.setdefault(category_of[question], []).append(question)
    for members in by_category.values():
        generator.shuffle(members)
        members.sort(key=lambda question: used.get(question, 0))
    categories = list(by_category.values())
    generator.shuffle(categories)
    categories.sort(key=lambda members: sum(used.get(question, 0) for question in members) / len(members))
    rounds = itertools.zip_longest(*categories)
    order = [question for one_each in rounds for question in one_each if question is not None]
    return order[: max(0, count)]


def _pairs(questions: Mapping[str, Collection[str]]) -> Sequence[tuple[str, str]]:
    if len(questions) < 2:
        raise ConfigError(
            "a tournament needs two contestants with answers",
            got=", ".join(questions) or "none",
            fix="launch/arena.py answers --arena … --contestants …",
        )
    return list(itertools.combinations(sorted(questions), 2))
