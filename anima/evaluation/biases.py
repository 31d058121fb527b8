"""How the judge judges: win rates by category, and the biases of position, of length, and between judges.

Pure functions of matches; "verdicts" are judgments of a single order.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from anima.evaluation.matches import Match

ALL = "all"


@dataclass(frozen=True)
class Record:
    """Wins, ties and losses of one side."""

    wins: int = 0
    ties: int = 0
    losses: int = 0

    @property
    def matches(self) -> int:
        """How many in all."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float | None:
        """Share of wins, a tie counting half; None without a match."""
        return (self.wins + self.ties / 2) / self.matches if self.matches else None

    def plus(self, score: float) -> "Record":
        """The record after one more match."""
        return Record(self.wins + (score == 1), self.ties + (score == 0.5), self.losses + (score == 0))


@dataclass(frozen=True)
class PositionBias:
    """First place against second.

    Attributes:
        shown_first: Record of whatever was shown first, over verdicts whose order is known.
        unknown: Verdicts whose order is not known.
        battles: Pairs that were judged in both orders.
        consistent: Of those, the same winner in both, or a tie in both.
        always_first: Of those, the first shown won both times.
        always_second: Of those, the second shown won both times.
    """

    shown_first: Record
    unknown: int
    battles: int
    consistent: int
    always_first: int
    always_second: int


@dataclass(frozen=True)
class LengthBias:
    """How often the longer answer won, over verdicts with a winner and two different lengths."""

    longer_won: int
    decided: int

    @property
    def share(self) -> float | None:
        """Share of wins of the longer answer; None if nothing was decided."""
        return self.longer_won / self.decided if self.decided else None


@dataclass(frozen=True)
class Agreement:
    """Two judges on what both judged; `kappa` corrects for chance (Cohen 1960), None if it has no meaning."""

    one: str
    other: str
    battles: int
    agreed: int
    kappa: float | None


def win_rates(matches: Iterable[Match]) -> dict[str, dict[str, Record]]:
    """Record of every model by category; `all` first."""
    records: dict[str, dict[str, Record]] = {ALL: {}}
    for match in matches:
        for category in (ALL, match.category) if match.category is not None else (ALL,):
            by_model = records.setdefault(category, {})
            by_model[match.model_a] = by_model.get(match.model_a, Record()).plus(match.score)
            by_model[match.model_b] = by_model.get(match.model_b, Record()).plus(1 - match.score)
    return {ALL: records.pop(ALL), **dict(sorted(records.items()))}


def head_to_head(matches: Iterable[Match]) -> dict[str, dict[str, Record]]:
    """Record of every model against every model that it met."""
    table: dict[str, dict[str, Record]] = {}
    for match in matches:
        for one, other, score in (
            (match.model_a, match.model_b, match.score),
            (match.model_b, match.model_a, 1 - match.score),
        ):
            row = table.setdefault(one, {})
            row[other] = row.get(other, Record()).plus(score)
    return table


def position_bias(verdicts: Sequence[Match]) -> PositionBias:
    """What showing an answer first does."""
    shown_first, unknown = Record(), 0
    seen: dict[tuple[str | None, str | None, str, str], float] = {}
    battles = consistent = always_first = always_second = 0
    for verdict in verdicts:
        if verdict.position not in ("first", "second"):
            unknown += 1
            continue
        told = verdict if verdict.position == "first" else verdict.turned()
        one, other, score = told.model_a, told.model_b, told.score
        shown_first = shown_first.plus(score)
        swapped = seen.pop((verdict.question_id, verdict.judge, other, one), None)
        if swapped is None:
            seen[verdict.question_id, verdict.judge, one, other] = score
            continue
        battles += 1
        consistent += score == 1 - swapped
        always_first += score == swapped == 1
        always_second += score == swapped == 0
    return PositionBias(shown_first, unknown, battles, consistent, always_first, always_second)


def length_bias(verdicts: Iterable[Match]) -> LengthBias:
    """Whether the longer answer wins. It may deserve to: compare the length-controlled ratings."""
    longer_won = decided = 0
    for verdict in verdicts:
        share = verdict.length_share
        if share and verdict.score != 0.5:
            decided += 1
            longer_won += (share > 0) == (verdict.score == 1)
    return LengthBias(longer_won, decided)


def judge_agreement(matches: Iterable[Match]) -> list[Agreement]:
    """Every two judges on what both judged: the same pair, question and, where it is known, order."""
    by_judge: dict[str, dict[tuple[str | None, str, str, str | None], float]] = {}
    for match in matches:
        if match.judge is not None:
            told = match if match.model_a < match.model_b else match.turned()
            by_judge.setdefault(match.judge, {})[told.question_id, told.model_a, told.model_b, told.position] = (
                told.score
            )
    agreements = []
    for one, other in itertools.combinations(sorted(by_judge), 2):
        shared = by_judge[one].keys() & by_judge[other].keys()
        if shared:
            pairs = [(by_judge[one][battle], by_judge[other][battle]) for battle in shared]
            agreed = sum(mine == theirs for mine, theirs in pairs)
            agreements.append(Agreement(one, other, len(pairs), agreed, _kappa(pairs)))
    return agreements


def _kappa(pairs: Sequence[tuple[float, float]]) -> float | None:
    """(observed - expected) / (1 - expected) agreement."""
    count = len(pairs)
    observed = sum(mine == theirs for mine, theirs in pairs) / count
    expected = sum(
        sum(mine == score for mine, _ in pairs) * sum(theirs == score for _, theirs in pairs)
        for score in (0.0, 0.5, 1.0)
    ) / (count * count)
    return None if expected == 1 else (observed - expected) / (1 - expected)
