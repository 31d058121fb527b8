"""Schedules: complete, balanced, stable, and adaptive ones that ask where it matters."""

from collections import Counter
from typing import Any

import pytest

from anima.errors import ConfigError
from anima.evaluation.adaptive import next_battles, open_pairs
from anima.evaluation.matches import Match
from anima.evaluation.schedule import Battle, all_battles, balanced_battles

CATEGORY = {str(n): ("math", "coding", "general")[n % 3] for n in range(30)}
ANSWERED = {name: list(CATEGORY) for name in "abcd"}


def test_all_is_every_pair_on_every_question() -> None:
    battles = all_battles(ANSWERED)
    assert len(battles) == len(set(battles)) == 6 * 30
    # stopped early, all pairs have met about equally often
    early = Counter((battle.one, battle.other) for battle in battles[:60])
    assert set(early.values()) == {10}
    assert len(all_battles({"a": ["1", "2"], "b": ["2", "3"]})) == 1
    with pytest.raises(ConfigError, match="two contestants"):
        all_battles({"a": ["1"]})


def test_balanced_over_pairs_categories_and_questions() -> None:
    battles = balanced_battles(ANSWERED, CATEGORY, 10, seed=0)
    assert set(Counter((battle.one, battle.other) for battle in battles).values()) == {10}
    by_pair_and_category = Counter((b.one, b.other, CATEGORY[b.question_id]) for b in battles)
    assert set(by_pair_and_category.values()) <= {3, 4}
    assert set(Counter(battle.question_id for battle in battles).values()) == {2}  # 60 battles on 30 questions
    assert battles == balanced_battles(ANSWERED, CATEGORY, 10, seed=0)
    assert battles != balanced_battles(ANSWERED, CATEGORY, 10, seed=1)


def test_a_newcomer_costs_only_its_own_battles() -> None:
    three = {name: ANSWERED[name] for name in "abd"}
    done = balanced_battles(three, CATEGORY, 10, seed=0)
    added = balanced_battles(ANSWERED, CATEGORY, 10, seed=0, done=done)
    assert Counter((b.one, b.other) for b in added) == {("a", "c"): 10, ("b", "c"): 10, ("c", "d"): 10}
    assert balanced_battles(ANSWERED, CATEGORY, 10, seed=0, done=[*done, *added]) == []
    assert len(balanced_battles(three, CATEGORY, 99, seed=0)) == 3 * 30  # no more than there are questions


def tournament(a_wins: int, b_wins: int) -> list[Match]:
    """a beats b so often of 20, both beat c always."""
    rows: list[tuple[str, str, Any]] = [
        ("a", "b", "model_a" if n < a_wins else "model_b") for n in range(a_wins + b_wins)
    ]
    rows += [(name, "c", "model_a") for name in "ab" for _ in range(20)]
    return [Match(*row, question_id=str(n)) for n, row in enumerate(rows)]


def test_adaptive_asks_where_neighbours_are_not_told_apart() -> None:
    pairs = open_pairs(tournament(12, 8), seed=0)
    assert [(higher, lower) for higher, lower, _ in pairs] == [("a", "b")]
    answered = {name: ANSWERED[name] for name in "abc"}
    done = [Battle(str(n), "a", "b") for n in range(20)]
    battles = next_battles(pairs, answered, CATEGORY, done, per_round=6, seed=0)
    assert len(battles) == 6
    assert {(battle.one, battle.other) for battle in battles} == {("a", "b")}
    assert not set(battles) & set(done)
    everything = [Battle(str(n), "a", "b") for n in range(30)]
    assert next_battles(pairs, answered, CATEGORY, everything, per_round=6, seed=0) == []


def test_adaptive_stops_when_all_are_told_apart_or_equal() -> None:
    assert open_pairs(tournament(19, 1), seed=0) == []
    pairs = open_pairs(tournament(10, 10), seed=0)
    assert len(pairs) == 1
    assert next_battles(pairs, {"a": ["1"], "b": ["1"]}, CATEGORY, [], per_round=6, seed=0) == []
