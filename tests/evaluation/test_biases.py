"""Biases on tables small enough to count by hand."""

from typing import Any

import pytest

from anima.evaluation.biases import Record, head_to_head, judge_agreement, length_bias, position_bias, win_rates
from anima.evaluation.matches import Match


def verdict(
    first: str, second: str, winner: Any, question: str = "1", judge: str = "j", lengths: Any = (None, None)
) -> Match:
    return Match(first, second, winner, question, "math", "first", judge, *lengths)


def test_win_rates_and_pairs() -> None:
    matches = [
        Match("x", "y", "model_a", category="math"),
        Match("y", "x", "tie"),
        Match("y", "z", "model_b", category="coding"),
    ]
    rates = win_rates(matches)
    assert list(rates) == ["all", "coding", "math"]
    assert rates["all"] == {"x": Record(1, 1, 0), "y": Record(0, 1, 2), "z": Record(1, 0, 0)}
    assert rates["all"]["x"].rate == 0.75
    assert rates["coding"] == {"y": Record(0, 0, 1), "z": Record(1, 0, 0)}
    assert head_to_head(matches)["y"] == {"x": Record(0, 1, 1), "z": Record(0, 0, 1)}


def test_position() -> None:
    bias = position_bias(
        [
            verdict("x", "y", "model_a"),
            verdict("y", "x", "model_a"),  # whoever is first
            verdict("x", "y", "model_b", "2"),
            Match("x", "y", "model_a", "2", None, "second", "j"),  # y first, x won again: always the second
            verdict("x", "y", "tie", "3"),
            verdict("y", "x", "tie", "3"),  # consistent
            verdict("x", "y", "model_a", "4"),
            verdict("y", "x", "model_b", "4"),  # consistent
            verdict("x", "y", "model_a", "5"),
            verdict("y", "x", "model_a", "5"),  # whoever is first, again
            verdict("x", "y", "model_a", "6"),  # no second order
            Match("x", "y", "model_a"),
        ]
    )
    assert bias.shown_first == Record(wins=6, ties=2, losses=3)
    assert (bias.battles, bias.consistent, bias.always_first, bias.always_second) == (5, 2, 2, 1)
    assert bias.unknown == 1


def test_length() -> None:
    bias = length_bias(
        [
            verdict("x", "y", "model_a", lengths=(9, 1)),
            verdict("x", "y", "model_b", lengths=(9, 1)),
            verdict("x", "y", "model_b", lengths=(1, 9)),
            verdict("x", "y", "tie", lengths=(1, 9)),
            verdict("x", "y", "model_a", lengths=(5, 5)),
            verdict("x", "y", "model_a"),
        ]
    )
    assert (bias.longer_won, bias.decided) == (2, 3)
    assert bias.share == pytest.approx(2 / 3)


def test_agreement_of_judges() -> None:
    """Judges agree on 2 of 4; j: 2 a, 2 b; k: 3 a, 1 b: chance 2/4*3/4 + 2/4*1/4 = 1/2, so kappa is 0."""
    said_by_j = ["model_a", "model_a", "model_b", "model_b"]
    said_by_k = ["model_a", "model_b", "model_a", "model_b"]
    matches = [verdict("x", "y", winner, str(n)) for n, winner in enumerate(said_by_j)]
    turned = {"model_a": "model_b", "model_b": "model_a"}
    # k's rows are told from the other side: it must not matter
    matches += [Match("y", "x", turned[winner], str(n), None, "second", "k") for n, winner in enumerate(said_by_k)]
    (agreement,) = judge_agreement(matches)
    assert (agreement.one, agreement.other, agreement.battles, agreement.agreed) == ("j", "k", 4, 2)
    assert agreement.kappa == pytest.approx(0)
    same = [verdict("x", "y", "tie", judge=judge) for judge in "jk"]
    assert judge_agreement(same)[0].kappa is None
    assert judge_agreement([verdict("x", "y", "tie"), verdict("x", "y", "tie", "2", "k")]) == []
