"""Matches as rows and as arrays: who met whom, who won. Knows neither judges nor ratings.

Input is JSON lines with `model_a`, `model_b`, `winner` (model_a, model_b, tie) and, where known, `question_id`,
`category`, `position` (first: model_a was shown first; second; both), `judge`, `length_a`, `length_b`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from anima.config.paths import expanded
from anima.data.json_rows import read_jsonl
from anima.errors import DataError

Winner = Literal["model_a", "model_b", "tie"]
Position = Literal["first", "second", "both"]
SCORES: dict[str, float] = {"model_a": 1.0, "tie": 0.5, "model_b": 0.0}
POSITIONS = {"first": "first", "model_a": "first", "second": "second", "model_b": "second", "both": "both"}
"""Accepted spellings; a file may also name the model that was shown first."""
_SIGN: dict[str | None, float] = {"first": 1.0, "second": -1.0}
_OTHER_WINNER: dict[str, Winner] = {"model_a": "model_b", "model_b": "model_a", "tie": "tie"}
_OTHER_POSITION: dict[str, Position] = {"first": "second", "second": "first"}
MIN_CLUSTERS = 20
"""Fewer questions than this are too few to be resampled as clusters."""


@dataclass(frozen=True, slots=True)
class Match:
    """One comparison. `position` says where model_a stood; lengths are characters; None: not known."""

    model_a: str
    model_b: str
    winner: Winner
    question_id: str | None = None
    category: str | None = None
    position: Position | None = None
    judge: str | None = None
    length_a: int | None = None
    length_b: int | None = None

    @property
    def score(self) -> float:
        """What model_a scored: 1, 0.5 or 0."""
        return SCORES[self.winner]

    @property
    def length_share(self) -> float | None:
        """(length of a - length of b) / (their sum), -1 to 1; None where a length is not known."""
        if self.length_a is None or self.length_b is None:
            return None
        return (self.length_a - self.length_b) / max(1, self.length_a + self.length_b)

    def turned(self) -> "Match":
        """The same match told from the other side."""
        return Match(
            self.model_b,
            self.model_a,
            _OTHER_WINNER[self.winner],
            self.question_id,
            self.category,
            _OTHER_POSITION.get(self.position or "both", self.position),
            self.judge,
            self.length_b,
            self.length_a,
        )

    def to_json(self) -> dict[str, object]:
        """What is known, as a line of a match file."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class MatchTable:
    """Matches as arrays of length N.

    Attributes:
        models: Names in alphabetical order; indices point here.
        first: Index of model_a.
        second: Index of model_b.
        score: What model_a scored.
        clusters: Number of the question; of the battle (a pair on a question, in both orders) where questions are too
            few to resample; of the match where they are not known.
        clustered_by: question, battle or match.
        length_share: See Match; None if any is unknown.
        shown_first: 1 where model_a was shown first, -1 where model_b was; None if any is unknown or merged.
    """

    models: tuple[str, ...]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    score: NDArray[np.float64]
    clusters: NDArray[np.int64]
    clustered_by: Literal["question", "battle", "match"]
    length_share: NDArray[np.float64] | None
    shown_first: NDArray[np.float64] | None


def tabulate(matches: Sequence[Match]) -> MatchTable:
    """Matches as arrays, in their order."""
    models = tuple(sorted({name for match in matches for name in (match.model_a, match.model_b)}))
    index = {name: number for number, name in enumerate(models)}
    clusters, clustered_by = _clusters(matches)
    shares = [share for match in matches if (share := match.length_share) is not None]
    places = [_SIGN[match.position] for match in matches if match.position in _SIGN]
    return MatchTable(
        models,
        np.array([index[match.model_a] for match in matches]),
        np.array([index[match.model_b] for match in matches]),
        np.array([match.score for match in matches]),
        clusters,
        clustered_by,
        np.array(shares) if len(shares) == len(matches) else None,
        np.array(places) if len(places) == len(matches) else None,
    )


def _clusters(matches: Sequence[Match]) -> tuple[NDArray[np.int64], Literal["question", "battle", "match"]]:
    """What is resampled together: verdicts on one question, or at least the two orders of a battle, are kin."""
    if any(match.question_id is None for match in matches):
        return np.arange(len(matches)), "match"
    by_question = len({match.question_id for match in matches}) >= MIN_CLUSTERS
    numbers: dict[object, int] = {}
    clusters = []
    for match in matches:
        battle = (match.question_id, *sorted((match.model_a, match.model_b)))
        clusters.append(numbers.setdefault(match.question_id if by_question else battle, len(numbers)))
    return np.array(clusters), "question" if by_question else "battle"


def read_matches(path: str) -> list[Match]:
    """The matches of a file, in its order.

    Raises:
        DataError: no such file, no match in it, or a row that is none; `file:line` and the key are named.
    """
    file = expanded(path)
    if not file.is_file():
        raise DataError("no such match file", where=f"--matches {path}", fix="check the path")
    matches = [_match(row.values, f"{path}{row.place}") for row in read_jsonl(file, path)]
    if not matches:
        raise DataError("the file holds no match", where=path, allowed="one match a line")
    return matches


def paired(matches: Iterable[Match]) -> list[tuple[Match, Match]]:
    """The two orders of every battle, told with the model first that was shown first.

    A match whose other order is missing (unparsable, or not judged yet) is in no pair.
    """
    waiting: dict[tuple[str | None, str | None, str, str], Match] = {}
    pairs = []
    for match in matches:
        if match.position not in ("first", "second"):
            continue
        told = match if match.position == "first" else match.turned()
        before = waiting.pop((told.question_id, told.judge, told.model_b, told.model_a), None)
        if before is None:
            waiting[told.question_id, told.judge, told.model_a, told.model_b] = told
        else:
            pairs.append((before, told))
    return pairs


def merge_orders(matches: Iterable[Match]) -> list[Match]:
    """One match for the two orders of a battle: a win only where both orders agree, else a tie."""
    merged = []
    for one, other in paired(matches):
        agree = one.score == 1 - other.score
        merged.append(replace(one, winner=one.winner if agree else "tie", position="both"))
    return merged


def _match(values: dict[str, object], where: str) -> Match:
    model_a, model_b = (_name(values, key, where) for key in ("model_a", "model_b"))
    if model_a == model_b:
        raise DataError("a model cannot meet itself", where=where, got=repr(model_a), fix="remove this line")
    winner = values.get("winner")
    if not isinstance(winner, str) or winner not in SCORES:
        raise DataError(
            "the winner is not one of three", where=f"{where}: winner", got=repr(winner), allowed=", ".join(SCORES)
        )
    question = values.get("question_id")
    if question is not None and (isinstance(question, bool) or not isinstance(question, str | int)):
        raise DataError("no question id", where=f"{where}: question_id", got=repr(question), allowed="text or number")
    position = values.get("position")
    known = POSITIONS.get(position) if isinstance(position, str) else None
    return Match(
        model_a,
        model_b,
        cast(Winner, winner),
        question_id=None if question is None else str(question),
        category=None if values.get("category") is None else _name(values, "category", where),
        position=cast(Position | None, known),
        judge=None if values.get("judge") is None else _name(values, "judge", where),
        length_a=_length(values, "length_a", where),
        length_b=_length(values, "length_b", where),
    )


def _name(values: dict[str, object], key: str, where: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{key} is missing" if value is None else f"{key} is no name",
            where=f"{where}: {key}",
            got=repr(value)[:60] if value is not None else ", ".join(values) or "no keys",
            allowed='text, as in {"model_a": "base", "model_b": "sft", "winner": "model_b"}',
        )
    return value


def _length(values: dict[str, object], key: str, where: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(
            f"{key} is no length", where=f"{where}: {key}", got=repr(value), allowed="characters, a whole number"
        )
    return value
