"""State from files, what is due next, and ratings and report from it."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anima.errors import ConfigError, DataError
from anima.evaluation.answers import Answered
from anima.evaluation.charts import heat_map, rating_plot
from anima.evaluation.matches import Match
from anima.evaluation.page import report_page
from anima.evaluation.ratings import RatingSettings, describe_judging, rate
from anima.evaluation.schedule import Battle
from anima.evaluation.table import judging_lines, rating_lines
from anima.evaluation.tournament import contestant_rows, due_battles, judged_matches, load_state, mixed_prompts
from anima.evaluation.verdicts import digest_answers

QUICK = RatingSettings(num_orderings=50, num_bootstrap=30)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_answers(arena: Path, name: str, num_questions: int = 4, **changes: str) -> None:
    (arena / "answers").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"contestant": {"name": name, "kind": "file", "path": "p", "prefix": "", **changes}}]
    rows += [asdict(Answered(str(n), "math", f"Q{n} {HOSTILE}", f"{name} {n} {HOSTILE}")) for n in range(num_questions)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (arena / "answers" / f"{name}.jsonl").write_text(text)


def write_verdicts(arena: Path, *verdicts: tuple[str, str, str, str], judge: str = "j", prompt: str = "p") -> None:
    """(question, first, second, text)."""
    answers = load_state(arena).answers
    with (arena / "verdicts.jsonl").open("a") as file:
        for question, first, second, text in verdicts:
            digest = digest_answers(answers[first][question], answers[second][question])
            row = {"key": "k", "question_id": question, "category": "math", "first": first, "second": second}
            row |= {
                "judge": judge,
                "prompt": prompt,
                "answers": digest,
                "text": text,
                "style": "choice",
                "prompt_tokens": 10,
            }
            file.write(json.dumps(row) + "\n")


def due(arena: Path, schedule: Any, **changes: Any) -> list[Battle]:
    options = {"battles_per_pair": 2, "battles_per_round": 1, "max_battles": None, "seed": 0, **changes}
    return due_battles(load_state(arena), "j", schedule, **options)


def test_what_is_due(tmp_path: Path) -> None:
    for name in "abc":
        write_answers(tmp_path, name)
    assert len(due(tmp_path, "all")) == 12
    start = due(tmp_path, "balanced")
    assert len(start) == 6
    one = start[0]
    write_verdicts(tmp_path, (one.question_id, one.one, one.other, "1"))
    assert one in due(tmp_path, "balanced")  # begun, and its other order is still to be judged
    assert len(due(tmp_path, "balanced")) == 6
    assert due(tmp_path, "adaptive")[0] == one
    assert len(due(tmp_path, "adaptive", max_battles=3)) == 3


def test_adaptive_goes_on_after_its_start_and_ends(tmp_path: Path) -> None:
    for name in "ab":
        write_answers(tmp_path, name, num_questions=12)
    for number, battle in enumerate(due(tmp_path, "adaptive", battles_per_pair=6)):
        winner = "a" if number % 3 else "b"
        for first, second in (("a", "b"), ("b", "a")):
            write_verdicts(tmp_path, (battle.question_id, first, second, "1" if first == winner else "2"))
    more = due(tmp_path, "adaptive", battles_per_pair=6, battles_per_round=3)
    assert len(more) == 9
    assert due(tmp_path, "adaptive", battles_per_pair=6, battles_per_round=3, max_battles=7) == more[:7]


def test_what_is_wrong_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nobody has answered"):
        load_state(tmp_path)
    write_answers(tmp_path, "a")
    write_answers(tmp_path, "b")
    with pytest.raises(DataError, match="no verdict"):
        judged_matches(load_state(tmp_path), None)
    write_verdicts(tmp_path, ("0", "a", "b", "1"))
    with pytest.raises(DataError, match="no verdict") as caught:
        judged_matches(load_state(tmp_path), "k")
    assert caught.value.allowed == "j"
    path = tmp_path / "answers" / "b.jsonl"
    path.write_text(path.read_text().replace('"question": "Q2', '"question": "Q9'))
    with pytest.raises(DataError, match="different questions"):
        load_state(tmp_path)


def test_verdicts_of_two_prompts_are_noticed(tmp_path: Path) -> None:
    for name in "ab":
        write_answers(tmp_path, name)
    write_verdicts(tmp_path, ("0", "a", "b", "1"), ("1", "a", "b", "1"))
    assert mixed_prompts(load_state(tmp_path)) == []
    write_verdicts(tmp_path, ("0", "a", "b", "2"), prompt="q")
    state = load_state(tmp_path)
    assert len(state.verdicts) == 2  # the newer verdict stands for the older
    assert mixed_prompts(state) == ["j (math)"]


def document_of(arena: Path) -> dict[str, Any]:
    state = load_state(arena)
    matches = judged_matches(state, None)
    document = rate(matches, "all", QUICK) | describe_judging(matches, matches)
    return document | {"contestants": contestant_rows(state.files), "num_verdicts": len(state.verdicts)}


def small_tournament(arena: Path) -> None:
    for name, prefix in (("a", "Please answer at length. "), ("b", ""), ("c", "")):
        write_answers(arena, name, prefix=prefix)
    for n in "0123":
        write_verdicts(arena, (n, "a", "b", "1"), (n, "b", "a", "2" if n != "3" else HOSTILE))
        write_verdicts(arena, (n, "b", "c", "1"), (n, "c", "b", "1" if n != "0" else "2"))


def test_terminal_tables(tmp_path: Path) -> None:
    small_tournament(tmp_path)
    document = document_of(tmp_path)
    lines = rating_lines(document)
    assert [line.split()[0] for line in lines[1:4]] == ["a", "b", "c"]
    assert "prefix" in lines[0]
    assert "yes" in lines[1]
    assert any("a alone got before every question: 'Please answer at length. '" in line for line in lines)
    assert any("a won every match" in line for line in lines)
    text = "\n".join(judging_lines(document))
    assert "shown first wins 11, ties 0, loses 4 (73%)" in text
    assert "57% of 7 battles end the same; 3 always the first, 0 always the second" in text
    json.dumps(document)  # all of it is JSON


class Page(HTMLParser):
    """Collects tags, what they load, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "action")]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def test_the_page_stands_alone_and_shows_what_models_wrote_as_text(tmp_path: Path) -> None:
    small_tournament(tmp_path)
    state = load_state(tmp_path)
    text = report_page(document_of(tmp_path), state.verdicts, state.answers, ["16 verdicts"])
    page = Page(text)
    assert page.loads == []
    assert not re.search(r"https?://|url\(|@import", text)
    assert page.tags.count("script") == 2  # the data and ours: no text of a model opened a third
    assert "img" not in page.tags
    data = json.loads(page.scripts[0])
    assert data["questions"]["0"] == f"Q0 {HOSTILE}"
    assert data["answers"]["c"]["2"] == f"c 2 {HOSTILE}"
    results = {(b["question"], b["one"], b["other"]): b["result"] for b in data["battles"]}
    assert results["0", "a", "b"] == "a"
    assert results["3", "a", "b"] == "unread"
    assert results["0", "b", "c"] == "b"
    assert results["1", "b", "c"] == "disagree"
    assert [v["outcome"] for v in data["battles"][0]["verdicts"]] == ["first", "second"]
    assert "Please answer at length." in text


def test_drawings_hold_their_numbers() -> None:
    svg = rating_plot({"a<b": 1100.0, "c": 900.0}, {"a<b": [1050.0, 1150.0]}, {"Elo": {"a<b": 1090.0, "c": 950.0}})
    assert svg.index("a&lt;b") < svg.index(">c<")
    assert "1100  (1050 … 1150)" in svg
    centres = [float(value) for value in re.findall(r'cx="([\d.]+)"', svg)]
    assert centres[0] > centres[1]
    assert rating_plot({"a": 1000.0}, {}, {}).count("circle") == 2  # a single value has a scale, too
    record = {"wins": 3, "ties": 0, "losses": 1, "rate": 0.75}
    table = heat_map({"a": {"b": record}}, ["a", "b"])
    assert "75%" in table
    assert "a against b: 3 won, 0 tied, 1 lost" in table
    assert table.count('class="empty"') == 3


def test_every_method_names_its_ratings() -> None:
    matches = [Match("x", "y", "model_a"), Match("y", "z", "tie"), Match("x", "z", "model_a")]
    for method in ("elo", "elo_orderings", "bradley_terry", "all"):
        document = rate(matches, method, QUICK)  # type: ignore[arg-type]
        assert list(document["ratings"]) == ["x", "y", "z"]  # type: ignore[call-overload]
        assert document["num_matches"] == 3
        assert rating_lines(document)[1].startswith("x ")
    with pytest.raises(DataError, match="never met"):
        rate([Match("a", "b", "tie"), Match("c", "d", "tie")], "bradley_terry", QUICK)
    with pytest.raises(ConfigError, match="does not play"):
        rate(matches, "elo", RatingSettings(start_ratings={"w": 1.0}))


def test_length_and_position_are_controlled_where_they_are_known() -> None:
    rows = [Match("x", "y", "model_a", position="first", length_a=9, length_b=1)] * 3
    rows += [Match("x", "y", "model_b", position="second", length_a=1, length_b=9)] * 3
    document: Any = rate(rows, "bradley_terry", QUICK)
    assert document["length_controlled"]["effect"] > 50
    assert document["position_controlled"]["effect"] > 50
    bare: Any = rate([Match("x", "y", "tie")], "bradley_terry", QUICK)
    assert bare["length_controlled"] is None
    assert bare["position_controlled"] is None
