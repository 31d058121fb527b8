"""Bradley-Terry strengths with ties after Davidson, optionally with a length covariate, and bootstrap intervals.

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
        log_tie: Log of Davidson's nu: how readily equals tie.
        length_effect: Elo points that an answer gains by having all of the length of the two; 0 without the covariate.
    """

    ratings: Floats
    low: Floats
    high: Floats
    resampled: Floats
    log_tie: float
    length_effect: float


def fit_strengths(
    first: Indices,
    second: Indices,
    score: Floats,
    num_models: int,
    *,
    clusters: Indices,
    length_share: Floats | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> Strengths:
    """Maximum likelihood strengths with percentile intervals from resampled clusters.

    P(first wins) : P(tie) : P(second wins) = e^(d/2) : nu : e^(-d/2), d the difference of strengths (Davidson 1970,
    "On extending the Bradley-Terry model to accommodate ties", equation 2.7). With `length_share`, d gains
    gamma * length_share, so that the strengths are those of answers of equal length.

    Args:
        first: Index of one model (N,).
        second: Index of its opponent (N,).
        score: What `first` scored (N,): 1, 0.5 or 0.
        num_models: M.
        clusters: Rows with the same number are resampled together (N,): battles over one question are not independent.
        length_share: (length of first - length of second) / (their sum) (N,), or None.
        num_bootstrap: B, number of resampled fits.
        seed: Of the private generator.
    """
    tied = score == 0.5
    won = np.where(tied, 0.0, score * 2 - 1)
    cells, cell_of_row = _cells(first, second, won, num_models, length_share)
    wins, ties = cells[:, -2], cells[:, -1]
    design = np.ascontiguousarray(cells[:, :-2])
    weights = np.bincount(cell_of_row, minlength=len(cells)).astype(np.float64)
    best = _maximize(design, wins, ties, weights, np.zeros(design.shape[1] + 1))
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
    effect = float(best[num_models]) * ELO_PER_LOGIT if length_share is not None else 0.0
    return Strengths(ratings, low, high, bootstrap, float(best[-1]), effect)


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
    first: Indices, second: Indices, won: Floats, num_models: int, length_share: Floats | None
) -> tuple[Floats, Indices]:
    """Distinct rows of (strengths' design, length share, win minus loss, tie), and the cell of every match."""
    width = num_models + (length_share is not None) + 2
    table = np.zeros((len(first), width))
    rows = np.arange(len(first))
    table[rows, first] = 1
    table[rows, second] = -1
    if length_share is not None:
        table[:, num_models] = length_share
    table[:, -2] = won
    table[:, -1] = won == 0
    if length_share is not None:
        return table, rows
    cells, cell_of_row = np.unique(table, axis=0, return_inverse=True)
    return cells, cell_of_row.reshape(-1)


def _maximize(design: Floats, wins: Floats, ties: Floats, weights: Floats, start: Floats) -> Floats:
    """Parameters of the highest posterior: strengths (and length effect), then log nu."""
    used = weights > 0
    design, wins, ties, weights = design[used], wins[used], ties[used], weights[used]
    precision = 1 / PRIOR_SD**2

    def outcome_shares(parameters: Floats) -> tuple[Floats, Floats, Floats]:
        """Log-normaliser, expected win minus loss, expected tie; (cells,) each."""
        half = design @ parameters[:-1] / 2
        top = np.maximum(np.abs(half), parameters[-1])
        win, loss, tie = np.exp(half - top), np.exp(-half - top), np.exp(parameters[-1] - top)
        total = win + loss + tie
        return np.log(total) + top, (win - loss) / total, tie / total

    def loss(parameters: Floats) -> tuple[float, Floats]:
        normaliser, lead, tie = outcome_shares(parameters)
        logits = wins * (design @ parameters[:-1]) / 2 + ties * parameters[-1]
        value = weights @ (normaliser - logits) + precision / 2 * parameters @ parameters
        slope = np.append(design.T @ (weights * (lead - wins)) / 2, weights @ (tie - ties))
        return float(value), slope + precision * parameters

    def curvature(parameters: Floats) -> Floats:
        _, lead, tie = outcome_shares(parameters)
        size = len(parameters)
        hessian = np.empty((size, size))
        hessian[:-1, :-1] = (design.T * (weights * (1 - tie - lead**2) / 4)) @ design
        hessian[:-1, -1] = hessian[-1, :-1] = -(design.T @ (weights * lead * tie)) / 2
        hessian[-1, -1] = weights @ (tie * (1 - tie))
        return hessian + precision * np.eye(size)

    fitted: Floats = minimize(loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-6}).x
    return fitted


def _on_elo_scale(strengths: Floats) -> Floats:
    centred: Floats = strengths - strengths.mean(axis=-1, keepdims=True)
    return centred * ELO_PER_LOGIT + CENTRE
