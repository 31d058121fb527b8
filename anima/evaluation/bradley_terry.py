"""Bradley-Terry strengths with ties after Davidson, optionally with a covariate, and bootstrap intervals.

Strengths do not depend on the order of matches. Pure functions of arrays; the only user of scipy.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

ELO_PER_LOGIT = 400 / math.log(10)
CENTRE = 1000.0
"""Mean of all ratings on the Elo scale."""
PRIOR_SD = 6.0
"""Logits, about 1,000 Elo: keeps a model that never lost finite, and is too wide to move any other."""


@dataclass(frozen=True)
class Strengths:
    """Fitted strengths on the Elo scale, mean 1000.

    Attributes:
        ratings: (M,).
        low: 2.5 % of the bootstrap fits are lower (M,).
        high: 2.5 % of the bootstrap fits are higher (M,).
        resampled: Ratings of every bootstrap fit (B, M).
        covariance: Of the ratings (M, M), if matches were independent; the bootstrap does not assume it.
        log_tie: Log of Davidson's nu: how readily equals tie.
        effect: Elo points that a covariate of 1 is worth; 0 without one.
    """

    ratings: Floats
    low: Floats
    high: Floats
    resampled: Floats
    covariance: Floats
    log_tie: float
    effect: float


def fit_strengths(
    first: Indices,
    second: Indices,
    score: Floats,
    num_models: int,
    *,
    clusters: Indices,
    covariate: Floats | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Strengths:
    """Maximum likelihood strengths with percentile intervals from resampled clusters.

    P(first wins) : P(tie) : P(second wins) = e^(d/2) : nu : e^(-d/2), d the difference of strengths (Davidson 1970,
    "On extending the Bradley-Terry model to accommodate ties", equation 2.7). With a covariate x, d gains gamma * x, so
    that the strengths are those at x = 0: answers of equal length, or a judge without a favourite place.

    Args:
        first: Index of one model (N,).
        second: Index of its opponent (N,).
        score: What `first` scored (N,): 1, 0.5 or 0.
        num_models: M.
        clusters: Rows with the same number are resampled together (N,): battles over one question are not independent.
        covariate: What may favour `first` beside its strength (N,), or None.
        num_bootstrap: B, number of resampled fits.
        seed: Of the private generator.
    """
    tied = score == 0.5
    won = np.where(tied, 0.0, score * 2 - 1)
    cells, cell_of_row = _cells(first, second, won, num_models, covariate)
    wins, ties = cells[:, -2], cells[:, -1]
    design = np.ascontiguousarray(cells[:, :-2])
    weights = np.bincount(cell_of_row, minlength=len(cells)).astype(np.float64)
    best = _maximize(design, wins, ties, weights, np.zeros(design.shape[1] + 1))
    inverse = np.linalg.inv(_curvature(design, weights, best))
    covariance = np.asarray(inverse[:num_models, :num_models] * ELO_PER_LOGIT**2, dtype=np.float64)
    generator = np.random.default_rng(seed)
    num_clusters = int(clusters.max()) + 1
    resampled = np.empty((num_bootstrap, len(best)))
    for row in range(num_bootstrap):
        drawn = np.bincount(generator.integers(0, num_clusters, num_clusters), minlength=num_clusters)
        weights = np.bincount(cell_of_row, drawn[clusters], minlength=len(cells)).astype(np.float64)
        resampled[row] = _maximize(design, wins, ties, weights, best)
    ratings = _on_elo_scale(best[:num_models])
    bootstrap = _on_elo_scale(resampled[:, :num_models])
    low, high = np.quantile(bootstrap, [0.025, 0.975], axis=0) if num_bootstrap else (ratings, ratings)
    effect = float(best[num_models]) * ELO_PER_LOGIT if covariate is not None else 0.0
    return Strengths(ratings, low, high, bootstrap, covariance, float(best[-1]), effect)


def connected_groups(first: Indices, second: Indices, num_models: int) -> list[list[int]]:
    """Models that are linked by matches, group by group; ratings of different groups cannot be compared."""
    group = list(range(num_models))

    def root(model: int) -> int:
        while group[model] != model:
            model = group[model]
        return model

    for one, other in {*zip(first.tolist(), second.tolist(), strict=True)}:
        group[root(one)] = root(other)
    roots = sorted({root(model) for model in range(num_models)})
    return [[model for model in range(num_models) if root(model) == top] for top in roots]


def _cells(
    first: Indices, second: Indices, won: Floats, num_models: int, covariate: Floats | None
) -> tuple[Floats, Indices]:
    """Distinct rows of (strengths' design, covariate, win minus loss, tie), and the cell of every match."""
    width = num_models + (covariate is not None) + 2
    table = np.zeros((len(first), width))
    rows = np.arange(len(first))
    table[rows, first] = 1
    table[rows, second] = -1
    if covariate is not None:
        table[:, num_models] = covariate
    table[:, -2] = won
    table[:, -1] = won == 0
    cells, cell_of_row = np.unique(table, axis=0, return_inverse=True)
    return cells, cell_of_row.reshape(-1)


def _maximize(design: Floats, wins: Floats, ties: Floats, weights: Floats, start: Floats) -> Floats:
    """Parameters of the highest posterior: strengths (and the covariate's effect), then log nu."""
    used = weights > 0
    design, wins, ties, weights = design[used], wins[used], ties[used], weights[used]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        normaliser, lead, tie = _outcomes(design, parameters)
        logits = wins * (design @ parameters[:-1]) / 2 + ties * parameters[-1]
        value = weights @ (normaliser - logits) + parameters @ parameters / (2 * PRIOR_SD**2)
        slope = np.append(design.T @ (weights * (lead - wins)) / 2, weights @ (tie - ties))
        return float(value), slope + parameters / PRIOR_SD**2

    def curvature(parameters: Floats) -> Floats:
        return _curvature(design, weights, parameters)

    fitted: Floats = minimize(loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-6}).x
    return fitted


def _outcomes(design: Floats, parameters: Floats) -> tuple[Floats, Floats, Floats]:
    """Log-normaliser, expected win minus loss, and probability of a tie of every cell."""
    half = design @ parameters[:-1] / 2
    top = np.maximum(np.abs(half), parameters[-1])
    win, loss, tie = np.exp(half - top), np.exp(-half - top), np.exp(parameters[-1] - top)
    total = win + loss + tie
    return np.log(total) + top, (win - loss) / total, tie / total


def _curvature(design: Floats, weights: Floats, parameters: Floats) -> Floats:
    """Second derivatives of the loss; its inverse is the covariance if cells are independent."""
    _, lead, tie = _outcomes(design, parameters)
    size = len(parameters)
    hessian = np.empty((size, size))
    hessian[:-1, :-1] = (design.T * (weights * (1 - tie - lead**2) / 4)) @ design
    hessian[:-1, -1] = hessian[-1, :-1] = -(design.T @ (weights * lead * tie)) / 2
    hessian[-1, -1] = weights @ (tie * (1 - tie))
    return hessian + np.eye(size) / PRIOR_SD**2


def _on_elo_scale(strengths: Floats) -> Floats:
    centred: Floats = strengths - strengths.mean(axis=-1, keepdims=True)
    return centred * ELO_PER_LOGIT + CENTRE
