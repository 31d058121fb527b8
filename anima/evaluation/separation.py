"""Which neighbours in the ranking are told apart at 95 %, and how many more battles the others need."""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from anima.evaluation.bradley_terry import ELO_PER_LOGIT, Strengths

NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""
ROUNDING_ELO = 0.5
EQUAL_ELO = 5.0
"""A smaller difference is called none: telling it apart takes tens of thousands of battles."""


@dataclass(frozen=True)
class Separation:
    """Two neighbours in the ranking.

    Attributes:
        higher: Index of the better one.
        lower: Index of the other.
        difference: Elo points between them.
        low: 2.5 % of the bootstrap fits show a smaller difference.
        high: 2.5 % show a larger one.
        separated: The interval lies above 0, by more than rounding.
        more_battles: Battles between the two that would separate them if the difference is what it seems; 0 if they
            are separated, None if the difference is practically none or its spread cannot be told.
    """

    higher: int
    lower: int
    difference: float
    low: float
    high: float
    separated: bool
    more_battles: int | None


def separations(strengths: Strengths, verdicts_per_battle: int) -> list[Separation]:
    """All neighbours, best first.

    Args:
        strengths: The fit.
        verdicts_per_battle: 2 where every battle is judged in both orders and each is a match of the fit, else 1.
    """
    order = np.argsort(-strengths.ratings, kind="stable")
    return [
        _separation(strengths, int(one), int(other), verdicts_per_battle) for one, other in itertools.pairwise(order)
    ]


def information_of_a_match(difference: float, log_tie: float) -> float:
    """Fisher information that one more match holds about the difference, per squared Elo point (Davidson's model)."""
    half = difference / ELO_PER_LOGIT / 2
    win, loss, tie = math.exp(half), math.exp(-half), math.exp(log_tie)
    total = win + loss + tie
    spread = (win + loss) / total - ((win - loss) / total) ** 2
    return spread / 4 / ELO_PER_LOGIT**2


def _separation(strengths: Strengths, higher: int, lower: int, verdicts_per_battle: int) -> Separation:
    difference = float(strengths.ratings[higher] - strengths.ratings[lower])
    differences = strengths.resampled[:, higher] - strengths.resampled[:, lower]
    low, high = (float(value) for value in np.quantile(differences, [0.025, 0.975]))
    separated = low > ROUNDING_ELO
    more: int | None = 0
    if not separated:
        more = _more_battles(strengths, higher, lower, float(differences.var()), verdicts_per_battle)
    return Separation(higher, lower, difference, low, high, separated, more)


def _more_battles(
    strengths: Strengths, higher: int, lower: int, variance: float, verdicts_per_battle: int
) -> int | None:
    """The variance must fall to (difference / 1.96)^2; information adds: 1 / v_new = 1 / v + k * information.

    Matches of one question or battle repeat each other in part: the bootstrap's variance over that of independent
    matches says how much less each of them tells.
    """
    difference = float(strengths.ratings[higher] - strengths.ratings[lower])
    contrast = np.zeros(len(strengths.ratings))
    contrast[higher], contrast[lower] = 1, -1
    if difference < EQUAL_ELO or variance <= 0:
        return None
    repetition = variance / float(contrast @ strengths.covariance @ contrast)
    information = information_of_a_match(difference, strengths.log_tie) / repetition * verdicts_per_battle
    missing = (NORMAL_95 / difference) ** 2 - 1 / variance
    return max(1, math.ceil(missing / information))
