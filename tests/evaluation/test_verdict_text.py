"""Verdict parsers against what people read in real verdicts, and against texts made to mislead them."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima.evaluation.verdict_text import read_choice, read_scores, read_verdict

OUTCOMES = {"1": "first", "2": "second", "3": "tie", "-": None}

# Read by hand, row by row, before the parser: the 60 math reviews whose scores their authors did not enter.
MATH_READ_BY_HAND = {
    (10, 1): (0, 1, 2, 19, 20),
    (10, 4): (18,),
    (10, 9): (150, 210),
    (10, 10): (206, 211, 212),
    (9, 10): (205,),
    (8, 10): (204,),
    (4, 10): (145, 156, 165, 174, 180),
    (3, 10): (158, 170, 191, 199),
    (2, 10): (129, 146, 148, 151, 167, 176, 181, 189, 190, 193, 194, 196, 197),
    (1, 10): (130, 131, 138, 139, 140, 142, 143, 144, 149, 152, 157)
    + (166, 168, 169, 172, 173, 175, 182, 192, 195, 200),
    (1, 9): (141, 171, 198),
    (1, 8): (147,),
}
# The three-class reviews that a parser of the last line as a number leaves out: row -> choice, where the last line is
# not the plain "Best answer: N" (those are read by their last letter). A hyphen: nobody could tell.
CHOICES_READ_BY_HAND = {
    "1": "18 21 23 24 26 32 34 39 53 61 64 66 77 86 96 101 108 115 117 126 142 149 154 157 158 167 168 173 178 187 188 "
    "190 194 201 203 211",
    "2": "13 19 20 25 27 28 37 40 43 44 45 47 49 56 57 62 65 67 68 70 71 73 80 83 90 91 93 95 98 99 103 104 105 112 "
    "113 121 128 129 131 135 137 140 147 148 150 151 155 161 166 169 170 171 175 179 181 185 189 191 198",
    "3": "0 1 11 30 46 84 88 109 139 153 182 197 208",
    "-": "2 3 4 5 6 7 8 9 10 12",
}


def rows(shared_data_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (shared_data_dir / name).read_text(encoding="utf-8").splitlines()]


def test_math_scores_that_people_entered(shared_data_dir: Path) -> None:
    reviews = [row for row in rows(shared_data_dir, "qlora_math_reviews.jsonl") if row["score"] != [-1, -1]]
    assert len(reviews) == 156
    assert [read_scores(row["text"]) for row in reviews] == [tuple(row["score"]) for row in reviews]


def test_math_scores_that_people_left_out(shared_data_dir: Path) -> None:
    truth = {row: scores for scores, members in MATH_READ_BY_HAND.items() for row in members}
    reviews = rows(shared_data_dir, "qlora_math_reviews.jsonl")
    assert sorted(truth) == [number for number, row in enumerate(reviews) if row["score"] == [-1, -1]]
    assert {number: read_scores(reviews[number]["text"]) for number in truth} == truth


def test_the_verdicts_that_the_seed_lost(shared_data_dir: Path) -> None:
    lost = rows(shared_data_dir, "elo_bad_verdicts.jsonl")
    assert len(lost) == 12
    assert [read_scores(row["review"]) for row in lost] == [tuple(row["scores_read_by_hand"]) for row in lost]


def test_choices_of_the_review_sample(shared_data_dir: Path) -> None:
    reviews = rows(shared_data_dir, "qlora_reviews_sample.jsonl")
    by_hand = {int(row): choice for choice, members in CHOICES_READ_BY_HAND.items() for row in members.split()}
    checked = 0
    for number, row in enumerate(reviews):
        if row["kind"] != "threeclass":
            continue
        stored = str(row["score"])
        if stored == "-1":
            last = row["text"].strip().splitlines()[-1]
            stored = by_hand[number] if number in by_hand else last.lower().removeprefix("best answer: ")
        assert read_choice(row["text"]) == OUTCOMES[stored], (number, row["text"][-200:])
        checked += 1
    assert checked == 413


def test_scores_of_the_review_sample(shared_data_dir: Path) -> None:
    """The -1 rows are math reviews: the text says what test_math_scores_that_people_left_out holds by hand."""
    reviews = [row for row in rows(shared_data_dir, "qlora_reviews_sample.jsonl") if row["kind"] == "pair10"]
    math = {row["text"]: number for number, row in enumerate(rows(shared_data_dir, "qlora_math_reviews.jsonl"))}
    by_hand = {row: scores for scores, members in MATH_READ_BY_HAND.items() for row in members}
    assert len(reviews) == 80
    for row in reviews:
        truth = tuple(row["score"]) if row["score"] != [-1, -1] else by_hand[math[row["text"]]]
        assert read_scores(row["text"]) == truth


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7\nBoth are fine.", (8, 7)),
        ("8, 7", (8, 7)),
        ("**8.5/10 7/10**\n", (8.5, 7)),
        ("9 3\nAssistant 1: 4, Assistant 2: 5 would be harsh", (9, 3)),
        ("Reasons.\n\n**Scores: 7 8**", (7, 8)),
        ("Assistant 1: 7 points.\nAssistant 2: 8 points.", (7, 8)),
        ("<think>8 7\n</think>\n5 6\nx", (5, 6)),
        # what is no verdict
        ("", None),
        ("error", None),
        ("100 90\nOn a scale of a hundred.", None),
        ("The points are (2, -2) and (10, 4).\nAssistant 1 wins.", None),
        ("The points are\n(2, 3)\n(4, 5)\nNeither is right.", None),
        ("Assistant 1: 3x = 5\nAssistant 2: 2y", None),
        ("Assistant 1:\n1. Correct formula.\n\nAssistant 2:\n2. Correct formula.", None),
        ("Assistant 1: 4/5\nAssistant 2: 6/10", None),
        # two readings that contradict each other
        ("Assistant 1: 5\nAssistant 2: 3\nOutput: (3, 5)", None),
    ],
)
def test_scores(text: str, scores: tuple[float, float] | None) -> None:
    assert read_verdict(text, "scores").scores == scores


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("Reasons.\n\n2", "2"),
        ("Reasons.\n**3**", "3"),
        ("My final verdict is: [[B]]", "2"),
        ("Verdict: 1", "1"),
        ("Assistant 1 is not the best answer; the best answer is Assistant 2", "2"),
        ("The better answer is that of Assistant 2, not Assistant 1.", "2"),
        ("最佳答案：2", "2"),
        ("<think>1</think>\n2", "2"),
        # what is no verdict
        ("", "-"),
        ("12", "-"),
        ("4", "-"),
        ("1\nbut see below", "-"),
        ("I choose 1 or 2", "-"),
        ("I choose 10", "-"),
        ("I cannot choose 1.", "-"),
        ("The best answer is not Assistant 1", "-"),
        ("The best answer is from Assistant 1 and Assistant 2", "-"),
        ("I choose 3. Just kidding, I choose 1.", "-"),
        ("[[A]] or [[B]]", "-"),
    ],
)
def test_choices(text: str, choice: str) -> None:
    assert read_verdict(text, "choice").outcome == OUTCOMES[choice]


def test_a_text_that_was_cut_off_has_no_last_line() -> None:
    """A small model, cut off at six tokens, wrote "1. 1\\n2": the 2 began a list."""
    assert read_verdict("1. 1\n2", "choice").outcome == "second"
    assert read_verdict("1. 1\n2", "choice", cut_off=True).outcome is None
    assert read_verdict("8 7\nThe first", "scores", cut_off=True).scores == (8, 7)
    assert read_verdict("8 1", "scores", cut_off=True).scores is None  # perhaps it would have been 8 10
    assert read_verdict("It says\nScores: 8 1", "scores", cut_off=True).scores is None


def test_scores_decide_the_outcome() -> None:
    assert [read_verdict(text, "scores").outcome for text in ("2 1", "1 2", "7 7", "?")] == [
        "first",
        "second",
        "tie",
        None,
    ]
