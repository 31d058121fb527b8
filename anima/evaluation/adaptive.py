"""Chooses the next battles where they tell most: between neighbours in the ranking that are not told apart yet.

Knows matches and battles; judges nothing.
"""

from collections.abc import Collection, Mapping, Sequence

from anima.evaluation.bradley_terry import fit_strengths
from anima.evaluation.matches import Match, tabulate
from anima.evaluation.schedule import Battle, spread_questions
from anima.evaluation.separation import Separation, separations

NUM_BOOTSTRAP = 200
"""Enough to choose battles; the final ratings use more."""


def open_pairs(matches: Sequence[Match], seed: int) -> list[tuple[str, str, Separation]]:
    """Neighbours in the ranking that are not separated, best first, with what they need.

    Args:
        matches: Both orders of every battle.
        seed: Of the bootstrap.
    """
    table = tabulate(matches)
    strengths = fit_strengths(
        table.first,
        table.second,
        table.score,
        len(table.models),
        clusters=table.clusters,
        num_bootstrap=NUM_BOOTSTRAP,
        seed=seed,
    )
    return [
        (table.models[gap.higher], table.models[gap.lower], gap)
        for gap in separations(strengths, verdicts_per_battle=2)
        if not gap.separated
    ]


def next_battles(
    pairs: Sequence[tuple[str, str, Separation]],
    questions: Mapping[str, Collection[str]],
    category_of: Mapping[str, str],
    done: Collection[Battle],
    *,
    per_round: int,
    seed: int,
) -> list[Battle]:
    """Battles of one round; none when every open pair has fought over all its questions, or differs by nothing.

    Args:
        pairs: See `open_pairs`.
        questions: Ids of the answered questions by contestant.
        category_of: Category by question id.
        done: Battles fought, readable or not.
        per_round: Most battles of a pair in one round: what they need is itself an estimate.
        seed: Of the private generator.
    """
    battles = []
    for higher, lower, gap in pairs:
        one, other = sorted((higher, lower))
        fought = {battle.question_id for battle in done if (battle.one, battle.other) == (one, other)}
        free = (set(questions[one]) & set(questions[other])) - fought
        count = 0 if gap.more_battles is None else min(gap.more_battles, per_round)
        battles += [
            Battle(q, one, other) for q in spread_questions(free, category_of, {}, count, f"{seed}/{one}/{other}")
        ]
    return battles
