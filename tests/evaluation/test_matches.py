"""Match files: what is read, what is refused and where, and how two orders become one."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima.errors import DataError
from anima.evaluation.matches import Match, merge_orders, paired, read_matches, tabulate

ROW = {"model_a": "x", "model_b": "y", "winner": "tie"}


def write(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "matches.jsonl"
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_all_that_a_row_may_hold(tmp_path: Path) -> None:
    extra = {"question_id": 7, "category": "math", "position": "second", "judge": "j", "length_a": 3, "length_b": 9}
    path = write(tmp_path, ROW | extra | {"unknown": [1]}, ROW | {"winner": "model_b", "position": "who knows"})
    assert read_matches(path) == [
        Match("x", "y", "tie", "7", "math", "second", "j", 3, 9),
        Match("x", "y", "model_b"),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"model_a": "x", "model_b": "y"}, [":2: winner", "model_a, tie, model_b"]),
        (ROW | {"winner": "x"}, [":2: winner", "'x'"]),
        (ROW | {"winner": ["tie"]}, [":2: winner"]),
        (ROW | {"model_b": "x"}, [":2", "cannot meet itself"]),
        (ROW | {"model_b": ""}, [":2: model_b"]),
        ({"a": "x", "b": "y", "winner": "tie"}, [":2: model_a", "a, b, winner"]),
        (ROW | {"length_a": -1}, [":2: length_a"]),
        (ROW | {"question_id": 1.5}, [":2: question_id"]),
        (ROW | {"category": 3}, [":2: category"]),
        ("[1]\n", [":2", "not an object"]),
        ('{"model_a": "x",\n', [":2", "wrong JSON"]),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path: Path, row: Any, words: list[str]) -> None:
    path = write(tmp_path, ROW, row)
    with pytest.raises(DataError) as caught:
        read_matches(path)
    for word in [path, *words]:
        assert word in str(caught.value)


def test_no_file_and_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such match file"):
        read_matches(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="holds no match"):
        read_matches(write(tmp_path, "\n"))


def order(first: str, second: str, winner: Any, question: str = "q", judge: str = "j") -> Match:
    return Match(first, second, winner, question, "math", "first", judge, 10, 20)


def test_orders_that_agree_win_and_others_tie() -> None:
    agree = [order("x", "y", "model_a"), order("y", "x", "model_b")]
    assert merge_orders(agree) == [Match("x", "y", "model_a", "q", "math", "both", "j", 10, 20)]
    for other in ("model_a", "tie"):
        assert [match.winner for match in merge_orders([agree[0], order("y", "x", other)])] == ["tie"]


def test_a_turned_row_is_the_other_order() -> None:
    """Both rows say that x won; the second row says it of model_a, shown second."""
    rows = [order("x", "y", "model_a"), Match("x", "y", "model_a", "q", "math", "second", "j")]
    assert [match.winner for match in merge_orders(rows)] == ["model_a"]


def test_what_has_no_partner_is_no_battle() -> None:
    rows = [order("x", "y", "model_a"), order("y", "x", "model_b", question="other"), order("y", "x", "tie", judge="k")]
    assert paired(rows) == []
    assert paired([*rows, Match("x", "y", "tie")]) == []


def test_arrays() -> None:
    table = tabulate(
        [
            order("b", "a", "model_a"),
            order("a", "c", "tie"),
            Match("c", "b", "model_b", "q", None, "second", None, 1, 3),
        ]
    )
    assert table.models == ("a", "b", "c")
    assert table.first.tolist() == [1, 0, 2]
    assert table.second.tolist() == [0, 2, 1]
    assert table.score.tolist() == [1, 0.5, 0]
    assert table.length_share is not None
    assert table.length_share.tolist() == pytest.approx([-1 / 3, -1 / 3, -0.5])
    assert table.shown_first is not None
    assert table.shown_first.tolist() == [1, 1, -1]
    assert tabulate([order("a", "b", "tie"), Match("a", "b", "tie")]).length_share is None


def test_what_is_resampled_together() -> None:
    many = [order(*names, "tie", question=str(n)) for n in range(20) for names in (("x", "y"), ("y", "x"))]
    table = tabulate(many)
    assert table.clustered_by == "question"
    assert table.clusters.tolist() == [n for n in range(20) for _ in range(2)]
    few = tabulate([order("x", "y", "tie"), order("x", "z", "tie"), order("y", "x", "tie")])
    assert few.clustered_by == "battle"
    assert few.clusters.tolist() == [0, 1, 0]
    assert tabulate([*many, Match("x", "y", "tie")]).clustered_by == "match"
