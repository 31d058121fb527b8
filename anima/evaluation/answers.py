"""Answers of contestants to the question set: one file each, made in batches, resumed where it stopped.

The first line of a file says how the answers were made; other settings under the same name are refused. Models come
as a callable.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from anima.config.paths import expanded
from anima.data.json_rows import read_jsonl
from anima.errors import ConfigError, DataError
from anima.evaluation.contestants import Contestant
from anima.evaluation.lines import LineWriter, field_of, read_lines
from anima.evaluation.questions import Question, QuestionField

FOLDER = "answers"
Answer = Callable[[Sequence[str]], list[str]]
"""Answers to a batch of prompts."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer; `question` is what was asked, without the contestant's prefix."""

    question_id: str
    category: str
    question: str
    answer: str


@dataclass(frozen=True)
class AnswerFile:
    """Everything one contestant said; `contestant` as stored: name, kind, path, prefix and so on."""

    contestant: dict[str, object]
    answers: dict[str, Answered]

    @property
    def name(self) -> str:
        """The contestant's name."""
        return str(self.contestant["name"])


def read_answers(path: Path) -> AnswerFile | None:
    """A contestant's file; None if nothing is in it.

    Raises:
        DataError: a line is broken.
    """
    lines = list(read_lines(path))
    if not lines:
        return None
    where, head = lines[0]
    contestant = head.get("contestant")
    if not isinstance(contestant, dict) or contestant.get("name") != path.stem:
        raise DataError("the first line does not name the contestant", where=where, fix="remove this file")
    answers = {}
    for where, row in lines[1:]:
        texts = {name: field_of(row, name, where) for name in ("question_id", "category", "question", "answer")}
        answers[texts["question_id"]] = Answered(**texts)
    return AnswerFile(contestant, answers)


def read_all_answers(arena: Path) -> list[AnswerFile]:
    """All contestants of an arena that have answers, by name."""
    files = [read_answers(path) for path in sorted((arena / FOLDER).glob("*.jsonl"))]
    return [file for file in files if file is not None and file.answers]


def missing_questions(
    arena: Path, contestant: Contestant, questions: Sequence[Question], field: QuestionField, max_new_tokens: int
) -> list[Question]:
    """Questions that this contestant has still to answer.

    Raises:
        ConfigError: answers under this name were made from something else, or in another way.
        DataError: a question's words have changed since.
    """
    path = arena / FOLDER / f"{contestant.name}.jsonl"
    stored = read_answers(path)
    if stored is None:
        return list(questions)
    now = _settings(contestant, field, max_new_tokens)
    differing = sorted(name for name in now if stored.contestant.get(name) != now[name])
    if differing:
        raise ConfigError(
            f"{contestant.name!r} has answers that were made otherwise",
            where=path,
            got=", ".join(f"{name} {now[name]!r}" for name in differing),
            allowed=", ".join(f"{name} {stored.contestant.get(name)!r}" for name in differing),
            fix="give the contestant another name, or remove this file to have it answer anew",
        )
    missing = []
    for question in questions:
        answered = stored.answers.get(str(question.question_id))
        if answered is None:
            missing.append(question)
        elif answered.question != question.asked(field):
            raise DataError(
                "a question was answered in other words",
                where=f"{path}: question {question.question_id}",
                got=repr(question.asked(field))[:80],
                allowed=repr(answered.question)[:80],
                fix="use another arena folder for another question set",
            )
    return missing


def answer_questions(
    arena: Path,
    contestant: Contestant,
    missing: Sequence[Question],
    field: QuestionField,
    max_new_tokens: int,
    answer: Answer,
    *,
    batch_size: int,
    on_batch: Callable[[int], None],
) -> None:
    """Let a contestant answer, batch by batch, shortest questions first so that a batch pads little.

    Args:
        arena: The arena's folder.
        contestant: Whose answers they are.
        missing: See `missing_questions`.
        field: Which words are asked.
        max_new_tokens: Recorded with the answers.
        answer: The model.
        batch_size: Questions at a time; what was answered before a kill is whole batches.
        on_batch: Called with the number of answers made so far.
    """
    path = arena / FOLDER / f"{contestant.name}.jsonl"
    order = sorted(missing, key=lambda question: len(question.asked(field)))
    with LineWriter(path) as writer:
        if read_answers(path) is None:
            writer.append({"contestant": _settings(contestant, field, max_new_tokens)})
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            texts = answer([contestant.prefix + question.asked(field) for question in batch])
            for question, text in zip(batch, texts, strict=True):
                row = Answered(str(question.question_id), question.category, question.asked(field), text)
                writer.append(asdict(row))
            on_batch(begin + len(batch))


def answers_of_file(path: str, questions: Sequence[Question], field: QuestionField) -> Answer:
    """Answers that were made elsewhere, as if a model gave them.

    Args:
        path: JSON lines with question_id and answer.
        questions: The question set.
        field: Which words are asked.

    Raises:
        DataError: no such file, a row without the two keys, an id given twice, or a question without an answer.
    """
    file = expanded(path)
    if not file.is_file():
        raise DataError("no such file of answers", where=f"--contestants file:…={path}", fix="check the path")
    by_id: dict[str, str] = {}
    for row in read_jsonl(file, path):
        where = f"{path}{row.place}"
        question_id = row.values.get("question_id")
        if question_id is None or str(question_id) in by_id:
            what = "question_id is missing" if question_id is None else "a question is answered twice"
            raise DataError(what, where=where, got=question_id, fix="one row a question, with question_id and answer")
        by_id[str(question_id)] = field_of(row.values, "answer", where)
    by_words: dict[str, str] = {}
    for question in questions:
        if str(question.question_id) not in by_id:
            raise DataError("a question has no answer", where=path, got=f"no question_id {question.question_id}")
        answer = by_id[str(question.question_id)]
        if by_words.setdefault(question.asked(field), answer) != answer:
            raise DataError("two questions of the same words", where=f"question {question.question_id}", fix="drop one")
    return lambda prompts: [by_words[prompt] for prompt in prompts]


def _settings(contestant: Contestant, field: QuestionField, max_new_tokens: int) -> dict[str, object]:
    if contestant.kind == "file":
        return {"name": contestant.name, "kind": "file", "path": contestant.path, "prefix": "", "asked": field}
    return {**asdict(contestant), "asked": field, "max_new_tokens": max_new_tokens}
