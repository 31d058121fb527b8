"""The question set: JSON or JSON lines with question_id, text, category and, where translated, translation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from anima.config.paths import expanded
from anima.data.json_rows import read_json, read_jsonl
from anima.errors import DataError

QuestionField = Literal["text", "translation"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question; `translation` is None where the file has none."""

    question_id: str | int
    text: str
    category: str
    translation: str | None = None

    def asked(self, field: QuestionField) -> str:
        """The words that contestants get."""
        return self.text if field == "text" or self.translation is None else self.translation


def read_questions(path: str, field: QuestionField = "text") -> list[Question]:
    """All questions of a file.

    Args:
        path: A JSON list, or JSON lines.
        field: Which words will be asked; with `translation` every question must have one.

    Raises:
        DataError: no such file, no question, a key missing, or an id given twice.
    """
    file = expanded(path)
    if not file.is_file():
        raise DataError("no such question file", where=f"--questions {path}", fix="check the path")
    rows = read_jsonl(file, path) if file.suffix == ".jsonl" else read_json(file, path)
    questions: list[Question] = []
    seen: set[str] = set()
    for row in rows:
        question = _question(row.values, f"{path}{row.place}", field)
        if str(question.question_id) in seen:
            raise DataError("a question id is given twice", where=f"{path}{row.place}", got=question.question_id)
        seen.add(str(question.question_id))
        questions.append(question)
    if not questions:
        raise DataError("the file holds no question", where=path, allowed="one object a question")
    return questions


def format_questions(questions: Sequence[Question]) -> str:
    """The set as one JSON list, as `read_questions` and the published translated Vicuna set have it."""
    rows = [
        {"question_id": q.question_id, "text": q.text, "category": q.category}
        | ({} if q.translation is None else {"translation": q.translation})
        for q in questions
    ]
    return json.dumps(rows, ensure_ascii=False)


def _question(values: dict[str, object], where: str, field: QuestionField) -> Question:
    question_id = values.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise DataError(
            "question_id is missing or neither text nor number",
            where=f"{where}: question_id",
            got=repr(question_id),
            allowed='an object such as {"question_id": 1, "text": "…", "category": "generic"}',
        )
    texts: dict[str, str | None] = {}
    for name in ("text", "category", "translation"):
        value = values.get(name)
        if value is not None and not (isinstance(value, str) and value.strip()):
            raise DataError(f"{name} is no text", where=f"{where}: {name}", got=repr(value)[:60])
        texts[name] = value
    if texts["text"] is None or texts[field] is None:
        raise DataError(
            f"the question has no {field if texts['text'] is not None else 'text'}",
            where=where,
            got=", ".join(values),
            fix="launch/arena.py translate makes translations" if texts["text"] is not None else None,
        )
    return Question(question_id, texts["text"], texts["category"] or "general", texts["translation"])
