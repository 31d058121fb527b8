"""How many more battles: the number must be the one that a larger tournament really needs."""

import numpy as np
import pytest

from anima.evaluation.bradley_terry import Strengths, fit_strengths
from anima.evaluation.separation import information_of_a_match, separations


def coin_tossed(num_matches: int, share: float) -> Strengths:
    """Two models; the first wins exactly this share, nobody ties."""
    score = (np.arange(num_matches) < round(share * num_matches)).astype(float)
    zeros = np.zeros(num_matches, dtype=int)
    return fit_strengths(zeros, zeros + 1, score, 2, clusters=np.arange(num_matches), num_bootstrap=400)


def test_a_clear_winner_is_separated() -> None:
    (gap,) = separations(coin_tossed(200, 0.7), verdicts_per_battle=1)
    assert (gap.higher, gap.lower, gap.separated, gap.more_battles) == (0, 1, True, 0)
    assert 0 < gap.low < gap.difference < gap.high


def test_the_battles_that_are_asked_for_suffice_and_are_needed() -> None:
    """At 56 % of n matches the normal bound is at n = 4 * 1.96^2 * pq / (2 * 0.06)^2 = 263."""
    (gap,) = separations(coin_tossed(100, 0.56), verdicts_per_battle=1)
    assert not gap.separated
    assert gap.more_battles == pytest.approx(163, abs=35)
    assert separations(coin_tossed(100 + gap.more_battles + 60, 0.56), 1)[0].separated
    assert not separations(coin_tossed(100 + gap.more_battles - 60, 0.56), 1)[0].separated


def test_a_battle_in_both_orders_counts_twice() -> None:
    fit = coin_tossed(100, 0.56)
    once, twice = (separations(fit, number)[0].more_battles for number in (1, 2))
    assert once is not None
    assert twice == pytest.approx(once / 2, abs=1)


def test_repetition_asks_for_more() -> None:
    """Four copies of every match, resampled together, tell no more than one: the bootstrap knows."""
    score = np.repeat((np.arange(100) < 56).astype(float), 4)
    zeros = np.zeros(400, dtype=int)
    fit = fit_strengths(zeros, zeros + 1, score, 2, clusters=np.repeat(np.arange(100), 4), num_bootstrap=400)
    (gap,) = separations(fit, 1)
    assert gap.more_battles == pytest.approx(4 * 163, rel=0.3)


def test_equals_are_not_asked_to_fight_on() -> None:
    (gap,) = separations(coin_tossed(100, 0.5), 1)
    assert (gap.separated, gap.more_battles) == (False, None)


def test_information_of_a_match_by_hand() -> None:
    """Without ties and between equals it is 1/4 per squared logit; a match that always ties tells nothing."""
    assert information_of_a_match(0, -50) * 173.7178**2 == pytest.approx(0.25, rel=1e-5)
    assert information_of_a_match(0, 50) == pytest.approx(0, abs=1e-12)
