"""Verdicts: asked once, kept whole, read again, and never confused with verdicts on other answers."""

import json
import threading
import time
from pathlib import Path

import pytest

from anima.evaluation.answers import Answered
from anima.evaluation.cost import Price, account, count_tokens, estimate
from anima.evaluation.judge import JudgeError
from anima.evaluation.prompts import load_prompts
from anima.evaluation.reply import Reply
from anima.evaluation.schedule import all_battles
from anima.evaluation.verdicts import (
    Answers,
    Call,
    current_verdicts,
    judge_calls,
    missing_calls,
    plan_calls,
    read_verdicts,
    verdict_matches,
)

PROMPTS = load_prompts("choice")


def make_answers(names: str = "ab", num_questions: int = 3, text: str = "{name} says {question}") -> Answers:
    return {
        name: {
            str(n): Answered(str(n), "math", f"Q{n}", text.format(name=name, question=n)) for n in range(num_questions)
        }
        for name in names
    }


def calls_of(answers: Answers, judge: str = "j") -> list[Call]:
    return plan_calls(all_battles(answers), answers, PROMPTS, judge)


class Judge:
    """Prefers a; fails from a given call on."""

    def __init__(self, fails_from: int | None = None, text: str | None = None) -> None:
        self.asked: list[str] = []
        self.fails_from = fails_from
        self.text = text
        self.lock = threading.Lock()

    def __call__(self, system: str, user: str) -> Reply:
        with self.lock:
            if self.fails_from is not None and len(self.asked) >= self.fails_from:
                raise JudgeError("down")
            self.asked.append(user)
        choice = "1" if user.find("a says") < user.find("b says") else "2"
        return Reply(self.text or f"Because.\n{choice}", 50, 5, "stop")


def run(arena: Path, answers: Answers, judge: Judge, name: str = "j", concurrency: int = 1) -> list[Call]:
    calls = missing_calls(calls_of(answers, name), read_verdicts(arena), name)
    judge_calls(arena, calls, answers, name, judge, concurrency=concurrency, on_reply=lambda reply, reading: None)
    return calls


def test_both_orders_are_asked_and_kept(tmp_path: Path) -> None:
    answers, judge = make_answers(), Judge()
    run(tmp_path, answers, judge, concurrency=3)
    assert len(judge.asked) == 6
    verdicts = read_verdicts(tmp_path)
    assert {(v.question_id, v.first, v.second) for v in verdicts} == {
        (str(n), *pair) for n in range(3) for pair in (("a", "b"), ("b", "a"))
    }
    assert {v.text for v in verdicts} == {"Because.\n1", "Because.\n2"}
    matches = verdict_matches(verdicts, answers)
    assert {(m.model_a, m.winner) for m in matches} == {("a", "model_a"), ("b", "model_b")}
    assert {(m.position, m.category, m.judge, m.length_a) for m in matches} == {("first", "math", "j", 8)}


def test_nothing_is_paid_twice(tmp_path: Path) -> None:
    answers, judge = make_answers(), Judge()
    run(tmp_path, answers, judge)
    assert run(tmp_path, answers, judge) == []
    assert len(judge.asked) == 6
    more = make_answers(num_questions=4)
    run(tmp_path, more, judge)
    assert len(judge.asked) == 8
    run(tmp_path, more, judge, name="another judge")
    assert len(judge.asked) == 16


def test_one_text_for_two_pairs_is_asked_once(tmp_path: Path) -> None:
    """c gives b's answers word for word: a against c is known from a against b; b against c is one text twice."""
    answers = {**make_answers(), "c": make_answers()["b"]}
    judge = Judge()
    judge.text = "3"
    assert estimate(calls_of(answers), 100, Price()).calls == 9
    run(tmp_path, answers, judge)
    assert len(judge.asked) == 9
    verdicts = read_verdicts(tmp_path)
    assert len(verdicts) == 18
    assert account(verdicts, Price()).prompt_tokens == 9 * 50


def test_a_failure_keeps_what_came_before_it(tmp_path: Path) -> None:
    answers = make_answers()
    with pytest.raises(JudgeError, match="down"):
        run(tmp_path, answers, Judge(fails_from=4))
    assert len(read_verdicts(tmp_path)) == 4
    again = Judge()
    run(tmp_path, answers, again)
    assert len(again.asked) == 2
    assert len(read_verdicts(tmp_path)) == 6


def test_replies_under_way_are_stored_before_a_failure_is_told(tmp_path: Path) -> None:
    """The first call fails at once, two more are under way: they have been paid for."""
    failed = threading.Event()
    lock = threading.Lock()
    calls: list[str] = []

    def ask(system: str, user: str) -> Reply:
        with lock:
            calls.append(user)
            number = len(calls)
        if number == 1:
            failed.set()
            raise JudgeError("down")
        failed.wait()
        time.sleep(0.1)
        return Reply("1", 1, 1, "stop")

    answers = make_answers()
    with pytest.raises(JudgeError):
        judge_calls(tmp_path, calls_of(answers), answers, "j", ask, concurrency=3, on_reply=lambda reply, reading: None)
    assert len(read_verdicts(tmp_path)) == len(calls) - 1 == 2


def test_unparsable_verdicts_are_kept_counted_and_not_scored(tmp_path: Path) -> None:
    answers, judge = make_answers(num_questions=1), Judge(text="Both have merits.")
    run(tmp_path, answers, judge)
    verdicts = read_verdicts(tmp_path)
    assert [v.text for v in verdicts] == ["Both have merits."] * 2
    assert verdict_matches(verdicts, answers) == []
    assert account(verdicts, Price()).unparsable == 2
    assert run(tmp_path, answers, judge) == []  # asking again would pay twice for the same


def test_texts_are_read_anew(tmp_path: Path) -> None:
    """What an older parser thought of a text does not matter."""
    answers = make_answers(num_questions=1)
    run(tmp_path, answers, Judge())
    path = tmp_path / "verdicts.jsonl"
    path.write_text(path.read_text().replace('"read_as": "first"', '"read_as": null'))
    assert {v.reading.outcome for v in read_verdicts(tmp_path)} == {"first", "second"}


def test_changed_answers_need_new_verdicts(tmp_path: Path) -> None:
    old, new = make_answers(), make_answers(text="{name} says now {question}")
    run(tmp_path, old, Judge())
    verdicts = read_verdicts(tmp_path)
    assert len(current_verdicts(verdicts, old)) == 6
    assert current_verdicts(verdicts, new) == []
    mixed = {"a": old["a"], "b": {**old["b"], "0": new["b"]["0"]}}
    assert len(current_verdicts(verdicts, mixed)) == 4
    assert len(run(tmp_path, mixed, Judge())) == 2


def test_the_key_is_question_answers_judge_and_prompt() -> None:
    answers = make_answers(num_questions=1)
    keys = {call.key for call in calls_of(answers)}
    assert len(keys) == 2
    assert not keys & {call.key for call in calls_of(answers, "k")}
    assert not keys & {
        call.key for call in calls_of(make_answers(num_questions=1, text="{name} says other {question}"))
    }
    other = plan_calls(all_battles(answers), answers, load_prompts("threeclass"), "j")
    assert not keys & {call.key for call in other}


def test_cost_before_and_after(tmp_path: Path) -> None:
    answers = make_answers()
    calls = calls_of(answers)
    price = Price(input=2.0, output=10.0)
    expected = estimate(calls, 100, price)
    assert (expected.calls, expected.highest_completion_tokens) == (6, 600)
    per_call = 10 + (len(calls[0].prompt.system) + len(calls[0].user)) / 4
    assert expected.prompt_tokens == pytest.approx(6 * per_call, rel=0.01)
    assert expected.highest_cost == pytest.approx((expected.prompt_tokens * 2 + 600 * 10) / 1e6, rel=0.01)
    run(tmp_path, answers, Judge())
    spent = account(read_verdicts(tmp_path), price)
    assert (spent.verdicts, spent.prompt_tokens, spent.completion_tokens) == (6, 300, 30)
    assert spent.cost == pytest.approx((300 * 2 + 30 * 10) / 1e6)


def test_chinese_counts_a_token_a_character() -> None:
    assert count_tokens("如何提高效率？") == 7
    assert count_tokens("four" * 5) == 5


def test_lines_say_how_they_were_read(tmp_path: Path) -> None:
    run(tmp_path, make_answers(num_questions=1), Judge())
    row = json.loads((tmp_path / "verdicts.jsonl").read_text().splitlines()[0])
    assert row["read_as"] == "first"
    assert row["finish_reason"] == "stop"
    assert row["style"] == "choice"
