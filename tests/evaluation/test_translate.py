"""Translation: what models put around it is taken off, and what was translated is not asked again."""

import time
from pathlib import Path

import pytest

from anima.evaluation.judge import JudgeError
from anima.evaluation.questions import Question
from anima.evaluation.reply import Reply
from anima.evaluation.translate import clean_translation, translate_questions

QUESTIONS = [Question(n, f"Question number {n}?", "generic") for n in (3, 1, 2)]


@pytest.mark.parametrize(
    ("reply", "text", "translation"),
    [
        ("  为什么？\n", "Why?", "为什么？"),
        ("问题：为什么？", "Why?", "为什么？"),  # the published set keeps such a label in question 2
        ("Translation: 为什么？", "Why?", "为什么？"),
        ("“为什么？”", "Why?", "为什么？"),
        ("<<<\n为什么？\n>>>", "Why?", "为什么？"),
        ("<think>hm</think>为什么？", "Why?", "为什么？"),
        ("问题：为什么？", "Question: why?", "问题：为什么？"),
        ("“一”和“二”", "'one' and 'two'", "“一”和“二”"),
    ],
)
def test_cleaning(reply: str, text: str, translation: str) -> None:
    assert clean_translation(reply, text) == translation


class Translator:
    def __init__(self, fails_on: str = "no question", empty_on: str = "no question") -> None:
        self.asked = 0
        self.fails_on, self.empty_on = fails_on, empty_on

    def __call__(self, system: str, user: str) -> Reply:
        if self.fails_on in user:
            raise JudgeError("down")
        self.asked += 1
        text = user.split("<<<\n")[1].removesuffix("\n>>>")
        return Reply("" if self.empty_on in user else f"译：{text}", 1, 1, "stop")


def translate(arena: Path, translator: Translator, language: str = "Chinese") -> list[Question]:
    return translate_questions(arena, QUESTIONS, language, "m", translator, concurrency=1, on_reply=lambda reply: None)


def test_resumed_after_a_failure(tmp_path: Path) -> None:
    first, second = Translator(fails_on="number 2"), Translator()
    with pytest.raises(JudgeError):
        translate(tmp_path, first)
    assert first.asked == 2
    translated = translate(tmp_path, second)
    assert second.asked == 1
    assert [(q.question_id, q.translation) for q in translated] == [(n, f"译：Question number {n}?") for n in (3, 1, 2)]
    translate(tmp_path, second, "French")
    assert second.asked == 4


def test_an_empty_translation_is_asked_again(tmp_path: Path) -> None:
    assert [q.question_id for q in translate(tmp_path, Translator(empty_on="number 1"))] == [3, 2]
    again = Translator()
    assert len(translate(tmp_path, again)) == 3
    assert again.asked == 1


def test_a_translation_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    def cut(system: str, user: str) -> Reply:
        return Reply("译：Question nu", 1, 1, "length")

    assert translate_questions(tmp_path, QUESTIONS, "C", "m", cut, concurrency=1, on_reply=lambda reply: None) == []
    again = Translator()
    assert len(translate(tmp_path, again, "C")) == 3
    assert again.asked == 3


def test_ctrl_c_asks_nothing_more(tmp_path: Path) -> None:
    asked = []

    def slowly(system: str, user: str) -> Reply:
        asked.append(user)
        time.sleep(0.05)
        return Reply("译", 1, 1, "stop")

    def interrupted(reply: Reply) -> None:
        raise KeyboardInterrupt

    many = [Question(n, f"Question number {n}?", "generic") for n in range(60)]
    with pytest.raises(KeyboardInterrupt):
        translate_questions(tmp_path, many, "Chinese", "m", slowly, concurrency=2, on_reply=interrupted)
    assert len(asked) < 60
