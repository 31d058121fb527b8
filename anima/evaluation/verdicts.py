"""Verdicts on disk and how they come about: what has to be asked, asking it in threads, reading it back as matches.

A verdict is known by (question, answers, judge, prompt); what is known is never asked again. Texts are kept, and read
anew every time, so that a better parser needs no new judgment.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from anima.evaluation.answers import Answered
from anima.evaluation.lines import LineWriter, field_of, read_lines
from anima.evaluation.matches import Match, Winner
from anima.evaluation.prompts import JudgePrompt, Prompts, prompt_for
from anima.evaluation.reply import Reply
from anima.evaluation.schedule import Battle
from anima.evaluation.verdict_text import Reading, Style, read_verdict

FILE = "verdicts.jsonl"
WINNERS: dict[str, Winner] = {"first": "model_a", "second": "model_b", "tie": "tie"}
Answers = Mapping[str, Mapping[str, Answered]]
"""Answer by contestant and question id."""


@dataclass(frozen=True, slots=True)
class Call:
    """One question to the judge: two answers in one order."""

    key: str
    question_id: str
    first: str
    second: str
    prompt: JudgePrompt
    user: str
    answers_digest: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge wrote on two answers in one order, and how it reads."""

    key: str
    question_id: str
    category: str
    first: str
    second: str
    judge: str
    prompt: str
    answers_digest: str
    text: str
    reading: Reading
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str


def plan_calls(battles: Iterable[Battle], answers: Answers, prompts: Prompts, judge: str) -> list[Call]:
    """Both orders of every battle."""
    calls = []
    for battle in battles:
        for first, second in ((battle.one, battle.other), (battle.other, battle.one)):
            one, other = answers[first][battle.question_id], answers[second][battle.question_id]
            prompt = prompt_for(prompts, one.category)
            user = prompt.render(one.question, one.answer, other.answer)
            key = _digest(judge, prompt.system, user, prompt.style)
            digest = digest_answers(one, other)
            calls.append(Call(key, battle.question_id, first, second, prompt, user, digest))
    return calls


def digest_answers(one: Answered, other: Answered) -> str:
    """Identity of what was compared, in this order."""
    return _digest(one.question, one.answer, other.answer)


def read_verdicts(arena: Path) -> list[Verdict]:
    """All verdicts of an arena, in the order they came.

    Raises:
        DataError: a line is broken.
    """
    verdicts = []
    for where, row in read_lines(arena / FILE):
        text, finish_reason = field_of(row, "text", where), str(row.get("finish_reason", ""))
        style: Style = "choice" if field_of(row, "style", where) == "choice" else "scores"
        verdicts.append(
            Verdict(
                key=field_of(row, "key", where),
                question_id=field_of(row, "question_id", where),
                category=field_of(row, "category", where),
                first=field_of(row, "first", where),
                second=field_of(row, "second", where),
                judge=field_of(row, "judge", where),
                prompt=field_of(row, "prompt", where),
                answers_digest=field_of(row, "answers", where),
                text=text,
                reading=_read(text, style, finish_reason),
                prompt_tokens=_count(row.get("prompt_tokens")),
                completion_tokens=_count(row.get("completion_tokens")),
                finish_reason=finish_reason,
            )
        )
    return verdicts


def current_verdicts(verdicts: Iterable[Verdict], answers: Answers) -> list[Verdict]:
    """The verdicts on the answers as they are now, the last one where a pair was judged twice with other prompts."""
    last: dict[tuple[str, str, str, str], Verdict] = {}
    for verdict in verdicts:
        one = answers.get(verdict.first, {}).get(verdict.question_id)
        other = answers.get(verdict.second, {}).get(verdict.question_id)
        if one is not None and other is not None and digest_answers(one, other) == verdict.answers_digest:
            last[verdict.question_id, verdict.first, verdict.second, verdict.judge] = verdict
    return list(last.values())


def verdict_matches(verdicts: Iterable[Verdict], answers: Answers) -> list[Match]:
    """One match for every readable verdict: model_a is the one shown first."""
    matches = []
    for verdict in verdicts:
        if verdict.reading.outcome is not None:
            matches.append(
                Match(
                    verdict.first,
                    verdict.second,
                    WINNERS[verdict.reading.outcome],
                    question_id=verdict.question_id,
                    category=verdict.category,
                    position="first",
                    judge=verdict.judge,
                    length_a=len(answers[verdict.first][verdict.question_id].answer),
                    length_b=len(answers[verdict.second][verdict.question_id].answer),
                )
            )
    return matches


def missing_calls(calls: Sequence[Call], verdicts: Sequence[Verdict], judge: str) -> list[Call]:
    """The calls whose verdict is not stored for these two contestants yet."""
    known = {(verdict.key, verdict.first, verdict.second) for verdict in verdicts if verdict.judge == judge}
    return [call for call in calls if (call.key, call.first, call.second) not in known]


def judge_calls(
    arena: Path,
    calls: Sequence[Call],
    answers: Answers,
    judge: str,
    ask: Callable[[str, str], Reply],
    *,
    concurrency: int,
    on_reply: Callable[[Reply, Reading], None],
) -> None:
    """Ask what is missing and store every reply as soon as it is there; one text that occurs twice is asked once.

    If the judge fails, replies that are under way are still stored before its error is raised.

    Args:
        arena: The arena's folder.
        calls: What to ask, in order.
        answers: For the categories.
        judge: Name under which the verdicts are stored.
        ask: System and user message to a reply; called in threads.
        concurrency: Calls at a time.
        on_reply: Called for every reply that was paid for, in this thread.
    """
    same: dict[str, list[Call]] = {}
    for call in calls:
        same.setdefault(call.key, []).append(call)
    with LineWriter(arena / FILE) as writer:
        stored = {verdict.key: verdict for verdict in read_verdicts(arena)}
        for key in [key for key in same if key in stored]:
            known = stored[key]
            reply = Reply(known.text, 0, 0, known.finish_reason)
            for call in same.pop(key):
                _store(writer, call, answers, judge, reply, 0.0, from_cache=True)
        waiting, failure = deque(same.values()), None
        with ThreadPoolExecutor(concurrency) as pool:
            running: dict[Future[tuple[Reply, float]], list[Call]] = {}
            while running or (waiting and failure is None):
                while waiting and failure is None and len(running) < concurrency:
                    group = waiting.popleft()
                    running[pool.submit(_timed, ask, group[0])] = group
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    group = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        failure = failure or error
                        continue
                    reply, seconds = future.result()
                    for position, call in enumerate(group):
                        _store(writer, call, answers, judge, reply, seconds, from_cache=position > 0)
                    on_reply(reply, _read(reply.text, group[0].prompt.style, reply.finish_reason))
        if failure is not None:
            raise failure


def _read(text: str, style: Style, finish_reason: str) -> Reading:
    return read_verdict(text, style, cut_off=finish_reason == "length")


def _timed(ask: Callable[[str, str], Reply], call: Call) -> tuple[Reply, float]:
    begin = time.monotonic()
    return ask(call.prompt.system, call.user), time.monotonic() - begin


def _store(
    writer: LineWriter, call: Call, answers: Answers, judge: str, reply: Reply, seconds: float, *, from_cache: bool
) -> None:
    reading = _read(reply.text, call.prompt.style, reply.finish_reason)
    writer.append(
        {
            "key": call.key,
            "question_id": call.question_id,
            "category": answers[call.first][call.question_id].category,
            "first": call.first,
            "second": call.second,
            "judge": judge,
            "prompt": call.prompt.digest,
            "style": call.prompt.style,
            "answers": call.answers_digest,
            "text": reply.text,
            "read_as": reading.outcome,
            "scores": reading.scores,
            "prompt_tokens": 0 if from_cache else reply.prompt_tokens,
            "completion_tokens": 0 if from_cache else reply.completion_tokens,
            "finish_reason": reply.finish_reason,
            "seconds": 0.0 if from_cache else round(seconds, 3),
            "from_cache": from_cache,
        }
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
