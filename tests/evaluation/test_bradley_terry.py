"""Davidson's model against closed forms, a generic optimiser, and simulated tournaments of known strengths."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from anima.evaluation.bradley_terry import ELO_PER_LOGIT, connected_groups, fit_strengths


def simulate(
    truth: np.ndarray, num_matches: int, seed: int, covariate_effect: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    first = generator.integers(0, len(truth), num_matches)
    second = (first + generator.integers(1, len(truth), num_matches)) % len(truth)
    covariate = generator.uniform(-1, 1, num_matches)
    half = (truth[first] - truth[second] + covariate_effect * covariate) / ELO_PER_LOGIT / 2
    weights = np.stack([np.exp(half), np.full(num_matches, 0.6), np.exp(-half)])
    drawn = generator.random(num_matches) * weights.sum(axis=0)
    score = np.where(drawn < weights[0], 1.0, np.where(drawn < weights[:2].sum(axis=0), 0.5, 0.0))
    return first, second, score, covariate


def test_two_models_in_closed_form() -> None:
    """60 wins, 20 losses, 20 ties: the likelihood is largest where the probabilities are the shares, so e^d = 3."""
    score = np.repeat([1.0, 0.0, 0.5], [60, 20, 20])
    fit = fit_strengths(np.zeros(100, int), np.ones(100, int), score, 2, clusters=np.arange(100), num_bootstrap=2)
    assert fit.ratings[0] - fit.ratings[1] == pytest.approx(400 * math.log10(3), abs=1.5)  # the prior is wide, not flat
    assert fit.ratings.mean() == pytest.approx(1000)
    # nu = P(tie) / sqrt(P(win) P(loss)) = 20 / sqrt(60 * 20)
    assert math.exp(fit.log_tie) == pytest.approx(20 / math.sqrt(1200), rel=0.01)
    # variance of ln(wins / losses) is 1 / wins + 1 / losses, the ties having a parameter of their own
    contrast = np.array([1.0, -1.0])
    assert contrast @ fit.covariance @ contrast == pytest.approx((1 / 60 + 1 / 20) * ELO_PER_LOGIT**2, rel=0.02)


def test_agrees_with_a_plain_likelihood_and_another_optimiser() -> None:
    first, second, score, _ = simulate(np.array([1150.0, 1000, 850]), 400, seed=2)

    def loss(parameters: np.ndarray) -> float:
        strengths = np.append(parameters[:2], -parameters[:2].sum())
        total = 0.0
        for one, other, scored in zip(first, second, score, strict=True):
            d = strengths[one] - strengths[other]
            logits = {1.0: d / 2, 0.5: parameters[2], 0.0: -d / 2}
            total -= logits[scored] - math.log(sum(math.exp(value) for value in logits.values()))
        return total

    reference = minimize(loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-8}).x
    fit = fit_strengths(first, second, score, 3, clusters=np.arange(400), num_bootstrap=2)
    expected = 1000 + np.append(reference[:2], -reference[:2].sum()) * ELO_PER_LOGIT
    np.testing.assert_allclose(fit.ratings, expected, atol=1.0)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    truth = np.array([1150.0, 1050, 950, 850])
    held = np.zeros(4)
    for seed in range(20):
        first, second, score, _ = simulate(truth, 300, seed)
        fit = fit_strengths(first, second, score, 4, clusters=np.arange(300), num_bootstrap=60, seed=seed)
        held += (fit.low <= truth) & (truth <= fit.high)
    assert 0.8 <= held.mean() / 20 <= 0.99


def test_the_covariate_takes_what_is_its_own() -> None:
    """Length is worth 300 points and the first model is long-winded: without control it looks better than it is."""
    generator = np.random.default_rng(0)
    truth = np.array([1000.0, 1000, 1000])
    first, second = np.repeat([0, 0, 1], 1000), np.repeat([1, 2, 2], 1000)
    lengths = np.array([0.4, 0.0, 0.0])
    covariate = lengths[first] - lengths[second] + generator.normal(0, 0.2, 3000)
    half = (truth[first] - truth[second] + 300 * covariate) / ELO_PER_LOGIT / 2
    score = (generator.random(3000) < 1 / (1 + np.exp(-2 * half))).astype(float)
    clusters = np.arange(3000)
    plain = fit_strengths(first, second, score, 3, clusters=clusters, num_bootstrap=2)
    controlled = fit_strengths(first, second, score, 3, clusters=clusters, covariate=covariate, num_bootstrap=2)
    assert plain.ratings[0] > 1050
    np.testing.assert_allclose(controlled.ratings, truth, atol=25)
    assert controlled.effect == pytest.approx(300, abs=60)
    assert plain.effect == 0


def test_clustered_matches_give_wider_intervals() -> None:
    """Every match four times over tells no more than once."""
    first, second, score, _ = simulate(np.array([1100.0, 900]), 100, seed=1)
    four = [np.tile(values, 4) for values in (first, second, score)]
    alone = fit_strengths(*four, 2, clusters=np.arange(400), num_bootstrap=300)
    together = fit_strengths(*four, 2, clusters=np.tile(np.arange(100), 4), num_bootstrap=300)
    ratio = (together.high - together.low)[0] / (alone.high - alone.low)[0]
    assert ratio == pytest.approx(2, rel=0.25)
    assert together.covariance[0, 0] == pytest.approx(alone.covariance[0, 0])


def test_a_model_that_never_lost_stays_finite() -> None:
    fit = fit_strengths(np.zeros(5, int), np.ones(5, int), np.ones(5), 2, clusters=np.arange(5), num_bootstrap=2)
    assert 100 < fit.ratings[0] - 1000 < 1500


def test_groups_that_never_met() -> None:
    assert connected_groups(np.array([0, 3]), np.array([1, 4]), 5) == [[0, 1], [2], [3, 4]]
    assert connected_groups(np.array([0, 1]), np.array([1, 2]), 3) == [[0, 1, 2]]
