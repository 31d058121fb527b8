"""Counts of batches put together: sums, and the first places in the order of the rows."""

from anima.data.report import SetReport, Tally


def _counted(*places: str) -> Tally:
    tally = Tally()
    for place in places:
        tally.add(0, place)
    return tally


def test_first_places_stay_the_first() -> None:
    whole = _counted(":1", ":2")
    whole.merge(_counted(":3", ":4", ":5", ":6"))
    whole.merge(_counted(":7"))
    assert (whole.rows, whole.first) == (7, ["0:1", "0:2", "0:3"])
    assert whole.named(["a.jsonl"]).first == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]


def test_reports_add_up() -> None:
    whole = SetReport(rows=2, kept=1, tokens=10, supervised_tokens=4, longest=7, answers=1, stopped_answers=1)
    whole.drop("long", 0, ":2")
    later = SetReport(rows=3, kept=3, tokens=5, supervised_tokens=2, longest=3, answers=4, stopped_answers=3)
    later.formats = {"alpaca": 3}
    later.drop("long", 0, ":3")
    later.drop("empty", 0, ":4")
    later.trimmed.add(0, ":5")
    whole.merge(later)
    assert (whole.rows, whole.kept, whole.tokens, whole.supervised_tokens) == (5, 4, 15, 6)
    assert (whole.longest, whole.answers, whole.stopped_answers, whole.formats) == (7, 5, 4, {"alpaca": 3})
    assert {reason: tally.first for reason, tally in whole.dropped.items()} == {
        "long": ["0:2", "0:3"],
        "empty": ["0:4"],
    }
    assert whole.trimmed.rows == 1
