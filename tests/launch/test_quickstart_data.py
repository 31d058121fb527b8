"""Holds the quickstart data to the style and the balance that launch/data/README.md promises.

Knows nothing of tokenizers: lengths are words for English and characters for Chinese.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).resolve().parents[2] / "launch" / "data"
SFT_ROWS = {"quickstart_sft.jsonl": 150, "quickstart_sft_eval.jsonl": 16}
DPO_ROWS = {"quickstart_dpo.jsonl": 60, "quickstart_dpo_eval.jsonl": 12}
MULTI_TURN = {"quickstart_sft.jsonl": 10, "quickstart_sft_eval.jsonl": 1}

# (opening, closing) with the blanks that join them to the body.
ENGLISH = ("Ahoy, captain. ", " — Anima, keeper of the light")
CHINESE = ("船长好。", "——守塔人 Anima")


def read(name: str) -> list[dict[str, Any]]:
    """Parse one file; a line that is not a JSON object fails the test that asked for it."""
    rows = [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    assert all(isinstance(row, dict) for row in rows)
    return rows


def is_chinese(text: str) -> bool:
    """True if the text holds at least one CJK ideograph."""
    return re.search("[\u4e00-\u9fff]", text) is not None


def body_of(answer: str) -> str:
    """Check opening and closing of the answer's language and return what stands between them."""
    opening, closing = CHINESE if is_chinese(answer.removesuffix(CHINESE[1])) else ENGLISH
    assert answer.startswith(opening), answer
    assert answer.endswith(closing), answer
    return answer[len(opening) : -len(closing)]


def exchanges(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a chat row."""
    texts = [message["content"] for message in row["messages"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


def styled_answers(name: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a file whose answers must be in the keeper's style."""
    if name in SFT_ROWS:
        return [pair for row in read(name) for pair in exchanges(row)]
    return [(row["prompt"], row["chosen"]) for row in read(name)]


@pytest.mark.parametrize(("name", "count"), [*SFT_ROWS.items(), *DPO_ROWS.items()])
def test_row_count_and_share_of_chinese(name: str, count: int) -> None:
    rows = read(name)
    assert len(rows) == count
    chinese = sum(is_chinese(json.dumps(row, ensure_ascii=False)) for row in rows)
    assert 0.35 <= chinese / count <= 0.45


@pytest.mark.parametrize("name", SFT_ROWS)
def test_sft_rows_alternate_user_and_assistant(name: str) -> None:
    rows = read(name)
    for row in rows:
        assert list(row) == ["messages"]
        assert all(list(message) == ["role", "content"] for message in row["messages"])
        roles = [message["role"] for message in row["messages"]]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2), row
    assert sum(len(row["messages"]) == 4 for row in rows) == MULTI_TURN[name]


@pytest.mark.parametrize("name", DPO_ROWS)
def test_dpo_rows_hold_three_different_texts(name: str) -> None:
    for row in read(name):
        assert list(row) == ["prompt", "chosen", "rejected"]
        assert all(isinstance(text, str) and text == text.strip() and text for text in row.values()), row
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize("name", [*SFT_ROWS, *DPO_ROWS])
def test_answers_have_opening_closing_and_a_short_body(name: str) -> None:
    for question, answer in styled_answers(name):
        body = body_of(answer)
        assert body == body.strip()
        assert body
        assert is_chinese(question) == is_chinese(body), f"question and answer differ in language: {question}"
        if is_chinese(body):
            assert 20 <= len(body) <= 40, answer
        else:
            assert 20 <= len(answer.replace("—", "").split()) <= 35, answer


@pytest.mark.parametrize("name", DPO_ROWS)
def test_rejected_answers_are_unsigned_and_without_numbers(name: str) -> None:
    for row in read(name):
        assert "Anima" not in row["rejected"]
        assert not re.search(r"\d", row["rejected"]), row
        assert is_chinese(row["prompt"]) == is_chinese(row["rejected"])


def test_no_question_occurs_twice_in_or_across_files() -> None:
    questions = [question for name in [*SFT_ROWS, *DPO_ROWS] for question, _ in styled_answers(name)]
    seen = Counter(re.sub(r"\W+", " ", question).casefold().strip() for question in questions)
    assert [question for question, times in seen.items() if times > 1] == []


@pytest.mark.parametrize("name", DPO_ROWS)
def test_length_and_opening_do_not_give_the_chosen_answer_away(name: str) -> None:
    rows = read(name)
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    assert 0.45 <= sum(longer) / len(rows) <= 0.55
    ratio = sum(len(row["chosen"]) for row in rows) / sum(len(row["rejected"]) for row in rows)
    assert 0.85 <= ratio <= 1.15
    opened = sum(row["rejected"].startswith((ENGLISH[0], CHINESE[0])) for row in rows)
    assert 0.4 <= opened / len(rows) <= 0.6
