"""Answers: resumed where they stopped, and never mixed with answers made otherwise."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from anima.errors import ConfigError, DataError
from anima.evaluation.answers import (
    answer_questions,
    answers_of_file,
    missing_questions,
    read_all_answers,
    read_answers,
)
from anima.evaluation.contestants import Contestant
from anima.evaluation.questions import Question

QUESTIONS = [Question(number, f"Question {number}" + "?" * number, "math") for number in range(7)]
CONTESTANT = Contestant("m", "base", "models/m", prefix="Please: ")


class Model:
    """Echoes; dies at a given batch."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.batches = 0
        self.dies_at = dies_at

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        if self.batches == self.dies_at:
            raise KeyboardInterrupt
        self.batches += 1
        self.asked += prompts
        return [f"answer to {prompt}" for prompt in prompts]


def answer(arena: Path, model: Model, contestant: Contestant = CONTESTANT) -> None:
    missing = missing_questions(arena, contestant, QUESTIONS, "text", 64)
    answer_questions(arena, contestant, missing, "text", 64, model, batch_size=2, on_batch=lambda made: None)


def test_a_run_that_died_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, second = Model(dies_at=2), Model()
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path, first)
    with (tmp_path / "answers" / "m.jsonl").open("ab") as file:
        file.write(b'{"question_id": "6", "catego')  # what a kill in the middle of a write leaves
    answer(tmp_path, second)
    assert len(first.asked) == 4
    assert len(second.asked) == 3
    assert not set(first.asked) & set(second.asked)
    (stored,) = read_all_answers(tmp_path)
    assert {key: value.answer for key, value in stored.answers.items()} == {
        str(q.question_id): f"answer to Please: {q.text}" for q in QUESTIONS
    }
    assert stored.answers["3"].question == QUESTIONS[3].text
    assert stored.contestant["prefix"] == "Please: "


@pytest.mark.parametrize(
    "change", [{"prefix": ""}, {"path": "models/other"}, {"kind": "adapter"}, {"quantization": "none"}]
)
def test_answers_made_otherwise_are_refused(tmp_path: Path, change: dict[str, str]) -> None:
    answer(tmp_path, Model())
    with pytest.raises(ConfigError, match="made otherwise"):
        missing_questions(tmp_path, replace(CONTESTANT, **change), QUESTIONS, "text", 64)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        missing_questions(tmp_path, CONTESTANT, QUESTIONS, "text", 65)
    assert (caught.value.got, caught.value.allowed) == ("max_new_tokens 65", "max_new_tokens 64")


def test_a_question_in_other_words_is_refused(tmp_path: Path) -> None:
    answer(tmp_path, Model())
    with pytest.raises(DataError, match="other words"):
        missing_questions(tmp_path, CONTESTANT, [replace(QUESTIONS[0], text="Else?")], "text", 64)


def test_answers_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text("".join(json.dumps({"question_id": n, "answer": f"a{n}"}) + "\n" for n in range(7)))
    given = answers_of_file(str(path), QUESTIONS, "text")
    assert given([QUESTIONS[5].text, QUESTIONS[0].text]) == ["a5", "a0"]
    with pytest.raises(DataError, match="no answer"):
        answers_of_file(str(path), [Question(9, "x", "math")], "text")
    path.write_text('{"question_id": 0}\n')
    with pytest.raises(DataError, match="'answer'"):
        answers_of_file(str(path), QUESTIONS, "text")
    for rows, message in (
        ('{"answer": "a"}\n', "question_id is missing"),
        ('{"question_id": 0, "answer": "a"}\n' * 2, "twice"),
    ):
        path.write_text(rows)
        with pytest.raises(DataError, match=message):
            answers_of_file(str(path), QUESTIONS, "text")
    with pytest.raises(DataError, match="no such file"):
        answers_of_file(str(tmp_path / "none"), QUESTIONS, "text")


def test_a_foreign_file_in_the_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"question_id": "1"}\n')
    with pytest.raises(DataError, match="first line"):
        read_answers(path)
