"""The ratings of a tournament by every method, with what they rest on, as one JSON document.

Composes the pure functions; knows no judge.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from anima.errors import ConfigError, DataError
from anima.evaluation.biases import (
    Record,
    head_to_head,
    judge_agreement,
    length_bias,
    position_bias,
    win_rates,
)
from anima.evaluation.bradley_terry import Strengths, connected_groups, fit_strengths
from anima.evaluation.elo import EloScale, elo_over_orderings, sequential_elo
from anima.evaluation.matches import Match, MatchTable, tabulate
from anima.evaluation.separation import separations

Method = Literal["all", "elo", "elo_orderings", "bradley_terry"]
Document = dict[str, object]


@dataclass(frozen=True)
class RatingSettings:
    """How ratings are computed.

    Attributes:
        scale: Of Elo.
        start_ratings: Elo before the first match, of models that do not start at `scale.start`.
        num_orderings: Random orders of the matches.
        num_bootstrap: Resampled fits.
        seed: Of the private generators.
        verdicts_per_battle: 2 where both orders of a battle are matches of their own, else 1.
    """

    scale: EloScale = field(default_factory=EloScale)
    start_ratings: Mapping[str, float] = field(default_factory=dict)
    num_orderings: int = 10_000
    num_bootstrap: int = 1000
    seed: int = 0
    verdicts_per_battle: int = 1


def rate(matches: Sequence[Match], method: Method, settings: RatingSettings) -> Document:
    """Ratings by one method, or by all with Bradley-Terry's in front.

    Raises:
        DataError: nothing to rate; groups of models that never met.
        ConfigError: a start rating for a model that does not play.
    """
    if not matches:
        raise DataError("no battle is readable in both orders", fix="launch/arena.py judge makes more")
    table = tabulate(matches)
    document: Document = {"method": method, "num_matches": len(matches), "models": list(table.models)}
    if method == "elo":
        return document | _elo(table, settings)
    if method == "elo_orderings":
        return document | _elo_orderings(table, settings)
    strengths = _bradley_terry(table, settings)
    if method == "bradley_terry":
        return document | strengths
    return document | strengths | {"elo": _elo(table, settings), "elo_orderings": _elo_orderings(table, settings)}


def describe_judging(matches: Sequence[Match], verdicts: Sequence[Match]) -> Document:
    """Win rates, pairs and biases.

    Args:
        matches: What was rated.
        verdicts: The judgments of single orders behind them, for the biases; the same where nothing was merged.
    """
    position, length = position_bias(verdicts), length_bias(verdicts)
    return {
        "win_rates": _records(win_rates(matches)),
        "head_to_head": _records(head_to_head(matches)),
        "position_bias": {
            "shown_first": _record(position.shown_first),
            "order_unknown": position.unknown,
            "both_orders": position.battles,
            "consistent": position.consistent,
            "always_first": position.always_first,
            "always_second": position.always_second,
        },
        "length_bias": {"longer_won": length.longer_won, "decided": length.decided, "share": length.share},
        "judge_agreement": [
            {"judges": [a.one, a.other], "battles": a.battles, "agreed": a.agreed, "kappa": a.kappa}
            for a in judge_agreement(matches)
        ],
    }


def _elo(table: MatchTable, settings: RatingSettings) -> Document:
    strangers = sorted(settings.start_ratings.keys() - set(table.models))
    if strangers:
        raise ConfigError(
            "a start rating for a model that does not play",
            where="--start_ratings",
            got=", ".join(strangers),
            allowed=", ".join(table.models),
        )
    scale = settings.scale
    start = np.array([settings.start_ratings.get(name, scale.start) for name in table.models])
    history = sequential_elo(table.first, table.second, table.score, start, scale)
    return {
        "ratings": _by_model(table, history[-1]),
        "settings": {"k": scale.k, "scale": scale.scale, "base": scale.base, "start": _by_model(table, start)},
    }


def _elo_orderings(table: MatchTable, settings: RatingSettings) -> Document:
    result = elo_over_orderings(
        table.first,
        table.second,
        table.score,
        len(table.models),
        num_orderings=settings.num_orderings,
        seed=settings.seed,
        scale=settings.scale,
    )
    return {
        "ratings": _by_model(table, result.mean),
        "spread": _by_model(table, result.spread),
        "intervals": _intervals(table, result.low, result.high),
        "num_orderings": result.num_orderings,
        "seed": settings.seed,
        "interval_meaning": "95 % of the orderings; says nothing about the choice of questions",
    }


def _bradley_terry(table: MatchTable, settings: RatingSettings) -> Document:
    groups = connected_groups(table.first, table.second, len(table.models))
    if len(groups) > 1:
        raise DataError(
            "some models never met, not even through others: their ratings cannot be compared",
            got=" | ".join(", ".join(table.models[model] for model in group) for group in groups),
            fix="judge battles between these groups",
        )
    plain = _fit(table, settings, None)
    return {
        "ratings": _by_model(table, plain.ratings),
        "intervals": _intervals(table, plain.low, plain.high),
        "tie_parameter": float(np.exp(plain.log_tie)),
        "num_bootstrap": settings.num_bootstrap,
        "resampled_by": table.clustered_by,
        "seed": settings.seed,
        "interval_meaning": f"95 % bootstrap, resampling each {table.clustered_by}",
        "one_sided": _one_sided(table),
        "length_controlled": _controlled(table, settings, table.length_share),
        "position_controlled": _controlled(table, settings, table.shown_first),
        "separation": [
            {
                "higher": table.models[s.higher],
                "lower": table.models[s.lower],
                "difference": s.difference,
                "interval": [s.low, s.high],
                "separated": s.separated,
                "more_battles": s.more_battles,
            }
            for s in separations(plain, settings.verdicts_per_battle)
        ],
    }


def _controlled(table: MatchTable, settings: RatingSettings, covariate: NDArray[np.float64] | None) -> Document | None:
    """Ratings without what the covariate does; `effect` is what a covariate of 1 is worth. None without a covariate."""
    if covariate is None or not np.any(covariate):
        return None
    fitted = _fit(table, settings, covariate)
    return {
        "ratings": _by_model(table, fitted.ratings),
        "intervals": _intervals(table, fitted.low, fitted.high),
        "effect": fitted.effect,
    }


def _fit(table: MatchTable, settings: RatingSettings, covariate: NDArray[np.float64] | None) -> Strengths:
    return fit_strengths(
        table.first,
        table.second,
        table.score,
        len(table.models),
        clusters=table.clusters,
        covariate=covariate,
        num_bootstrap=settings.num_bootstrap,
        seed=settings.seed,
    )


def _one_sided(table: MatchTable) -> dict[str, str]:
    """Models that won or lost everything: the data bound their strength on one side only."""
    notes = {}
    for index, name in enumerate(table.models):
        scores = np.concatenate([table.score[table.first == index], 1 - table.score[table.second == index]])
        if np.all(scores == scores[0]) and scores[0] != 0.5:
            notes[name] = "won every match" if scores[0] == 1 else "lost every match"
    return notes


def _by_model(table: MatchTable, values: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(table.models, values, strict=True)}


def _intervals(table: MatchTable, low: NDArray[np.float64], high: NDArray[np.float64]) -> dict[str, list[float]]:
    pairs = zip(table.models, low, high, strict=True)
    return {name: [float(bottom), float(top)] for name, bottom, top in pairs}


def _record(record: Record) -> dict[str, object]:
    return {"wins": record.wins, "ties": record.ties, "losses": record.losses, "rate": record.rate}


def _records(table: Mapping[str, Mapping[str, Record]]) -> dict[str, dict[str, object]]:
    return {outer: {inner: _record(record) for inner, record in row.items()} for outer, row in table.items()}
