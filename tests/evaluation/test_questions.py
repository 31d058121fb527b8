"""Question sets: the published ones, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima.errors import DataError
from anima.evaluation.questions import format_questions, read_questions


def test_the_translated_vicuna_set_is_reproduced_byte_for_byte(shared_data_dir: Path) -> None:
    path = shared_data_dir / "translated_vicuna_eval_set.json"
    questions = read_questions(str(path), "translation")
    assert len(questions) == 80
    assert questions[0].asked("translation") == "如何提高我的时间管理技能？"
    assert questions[0].asked("text") == "How can I improve my time management skills?"
    assert format_questions(questions) == path.read_text(encoding="utf-8")


def test_json_lines_and_missing_categories(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question_id": "a", "text": "Why?"}\n')
    (question,) = read_questions(str(path))
    assert (question.question_id, question.category, question.translation) == ("a", "general", None)
    assert json.loads(format_questions([question])) == [{"question_id": "a", "text": "Why?", "category": "general"}]


@pytest.mark.parametrize(
    ("rows", "field", "words"),
    [
        ([], "text", "holds no question"),
        ([{"text": "x"}], "text", ":1: question_id"),
        ([{"question_id": True, "text": "x"}], "text", ":1: question_id"),
        ([{"question_id": 1}], "text", "no text"),
        ([{"question_id": 1, "text": " "}], "text", "text is no text"),
        ([{"question_id": 1, "text": "x"}], "translation", "arena.py translate"),
        ([{"question_id": 1, "text": "x"}, {"question_id": "1", "text": "y"}], "text", ":2"),
    ],
)
def test_what_is_no_question_set(tmp_path: Path, rows: list[Any], field: Any, words: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as caught:
        read_questions(str(path), field)
    assert words in str(caught.value)
    with pytest.raises(DataError, match="no such question file"):
        read_questions(str(tmp_path / "none"))
