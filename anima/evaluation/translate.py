"""A question set into another language by a model behind an endpoint; resumed question by question.

The model comes as a callable.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from anima.evaluation.lines import LineWriter, field_of, read_lines
from anima.evaluation.questions import Question
from anima.evaluation.reply import Reply

FILE = "translations.jsonl"
SYSTEM = "You are a professional translator."
_LABEL = re.compile(r"^\s*(?:translation|question|text|译文|翻译|问题|题目)\s*[:：]\s*", re.IGNORECASE)
_QUOTES = (("“", "”"), ('"', '"'), ("「", "」"), ("```", "```"))


def translation_request(text: str, language: str) -> str:
    """What the model is asked."""
    return (
        f"Translate the question between the marks into {language}. Keep its meaning, tone, names, numbers, formulas "
        f"and code as they are. Do not answer it. Write nothing but the translation.\n\n<<<\n{text}\n>>>"
    )


def clean_translation(reply: str, text: str) -> str:
    """The reply without what models like to put around a translation, unless the question has the same itself."""
    cleaned = re.sub(r"\A\s*<think>.*?</think>", "", reply, flags=re.DOTALL).strip()
    cleaned = cleaned.removeprefix("<<<").removesuffix(">>>").strip()
    for opening, closing in _QUOTES:
        whole = cleaned.startswith(opening) and cleaned.endswith(closing) and len(cleaned) > len(opening + closing)
        if whole and not text.startswith(opening) and closing not in cleaned[len(opening) : -len(closing)]:
            cleaned = cleaned[len(opening) : -len(closing)].strip()
    return cleaned if _LABEL.match(text) else _LABEL.sub("", cleaned, count=1)


def translate_questions(
    arena: Path,
    questions: Sequence[Question],
    language: str,
    model: str,
    ask: Callable[[str, str], Reply],
    *,
    concurrency: int,
    on_reply: Callable[[Reply], None],
) -> list[Question]:
    """All questions with their translations, in their order; what an earlier run translated is not asked again.

    A question whose translation came back empty or cut off is asked again next time and is left out here.

    Args:
        arena: Folder of the memory.
        questions: The set.
        language: Its name in English.
        model: Part of a translation's identity.
        ask: System and user message to a reply; called in threads.
        concurrency: Calls at a time.
        on_reply: Called for every reply, in this thread.
    """
    known: dict[tuple[str, str, str], str] = {}
    for where, row in read_lines(arena / FILE):
        key = (field_of(row, "text", where), field_of(row, "language", where), field_of(row, "model", where))
        known[key] = field_of(row, "translation", where)
    missing = [question for question in questions if (question.text, language, model) not in known]
    with LineWriter(arena / FILE) as writer, ThreadPoolExecutor(concurrency) as pool:
        running = {pool.submit(ask, SYSTEM, translation_request(q.text, language)): q for q in missing}
        failure: BaseException | None = None
        try:
            for future in as_completed(running):
                if future.cancelled():
                    continue
                if (error := future.exception()) is not None:
                    failure = failure or error
                    for other in running:
                        other.cancel()
                    continue
                question, reply = running[future], future.result()
                translation = clean_translation(reply.text, question.text)
                if translation and reply.finish_reason != "length":
                    row = {"question_id": question.question_id, "text": question.text, "language": language}
                    writer.append({**row, "model": model, "translation": translation, "reply": reply.text})
                    known[question.text, language, model] = translation
                on_reply(reply)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C or a full disk: pay for nothing that would be lost
    if failure is not None:
        raise failure
    return [
        replace(question, translation=known[question.text, language, model])
        for question in questions
        if (question.text, language, model) in known
    ]
