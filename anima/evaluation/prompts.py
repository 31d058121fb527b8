"""What a judge is asked: one prompt for a category of questions, ours or a user's file.

A file has the published format: JSON lines with system_prompt, prompt_template ({question} {answer_1} {answer_2}
{prompt}), defaults.prompt and category. Which kind of verdict it asks for is read off its words, or its `verdict` key.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from anima.config.paths import expanded
from anima.data.json_rows import read_jsonl
from anima.errors import ConfigError, DataError
from anima.evaluation.verdict_text import Style

PLACES = ("question", "answer_1", "answer_2", "prompt")
GENERAL = "general"
BUILT_IN = ("scores", "choice", "threeclass")
_ASKS_FOR_A_CHOICE = re.compile(r"choose 3|3 if (?:the|both)|number 1 or 2|\[\[C\]\]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """One prompt. `template` has the places {question}, {answer_1}, {answer_2} and {prompt}."""

    category: str
    system: str
    template: str
    instruction: str
    style: Style

    def render(self, question: str, answer_1: str, answer_2: str) -> str:
        """The user's message; texts are put in as they are, braces and all."""
        texts = {"question": question, "answer_1": answer_1, "answer_2": answer_2, "prompt": self.instruction}
        return re.sub(r"\{(question|answer_1|answer_2|prompt)\}", lambda place: texts[place[1]], self.template)

    @property
    def digest(self) -> str:
        """Identity of the wording."""
        text = json.dumps([self.system, self.template, self.instruction, self.style])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


Prompts = Mapping[str, JudgePrompt]
"""Prompt by category; `general` serves every category that has none of its own."""

_SYSTEM = "You are a strict and fair examiner. You compare two answers to one question and never favour a position."
_TEMPLATE = (
    "Question:\n{question}\n\n"
    "<answer of assistant 1>\n{answer_1}\n</answer of assistant 1>\n\n"
    "<answer of assistant 2>\n{answer_2}\n</answer of assistant 2>\n\n"
    "{prompt}"
)
_MERITS = {
    GENERAL: (
        "Compare the two answers above. What counts: does the answer do what was asked, is it true, is it complete "
        "without padding, is it clear, and is it in the language of the question?"
    ),
    "coding": (
        "Compare the two programs above. What counts: does the code run and solve the task as stated, at the edges "
        "too; is it efficient enough; is it readable and explained where needed? Trace the code before you judge."
    ),
    "math": (
        "First solve the problem yourself, step by step. Then check both answers against your solution: the final "
        "result counts most, then whether each step follows from the one before."
    ),
}
_EVERYTHING = (
    "Compare the two answers above. If the question needs a calculation or a program, work it out yourself first. "
    "What counts: does the answer do what was asked, is it true, is it complete without padding, is it clear?"
)
_FAIR = "Length alone is no merit, and which answer comes first means nothing."
_ASK_SCORES = (
    "Begin with one line that holds nothing but two numbers from 1 to 10, the score of assistant 1 and the score of "
    "assistant 2, separated by a space. Give your reasons below it."
)
_ASK_SCORES_LAST = (
    "Give your reasons. End with one line of the form `Scores: X Y`, where X and Y are numbers from 1 to 10 for "
    "assistant 1 and assistant 2."
)
_ASK_CHOICE = (
    "Give your reasons. End with one line that holds nothing but a number: 1 if assistant 1 is better, 2 if "
    "assistant 2 is better, 3 if the two are equally good or equally bad."
)


def built_in_prompts(name: str) -> dict[str, JudgePrompt]:
    """Our own prompts.

    Args:
        name: `scores` (1 to 10 each, by category), `choice` (1, 2 or 3 for a tie, by category), or `threeclass` (the
            same choice, one prompt for everything).
    """
    if name == "threeclass":
        return {GENERAL: _own(GENERAL, _EVERYTHING, _ASK_CHOICE, "choice")}
    prompts = {}
    for category, merits in _MERITS.items():
        # Whoever has to calculate first must not be asked for a number first.
        ask = _ASK_CHOICE if name == "choice" else _ASK_SCORES_LAST if category == "math" else _ASK_SCORES
        prompts[category] = _own(category, merits, ask, "choice" if name == "choice" else "scores")
    return prompts


def load_prompts(source: str) -> dict[str, JudgePrompt]:
    """Built-in prompts by name, or those of a file.

    Raises:
        ConfigError: neither a name nor a file.
        DataError: a row lacks a key or a place, or two rows are for one category.
    """
    if source in BUILT_IN:
        return built_in_prompts(source)
    path = expanded(source)
    if not path.is_file():
        raise ConfigError(
            "no such judge prompts",
            where="--judge_prompts",
            got=source,
            allowed=f"{', '.join(BUILT_IN)}, or the path of a JSON lines file",
        )
    prompts: dict[str, JudgePrompt] = {}
    for row in read_jsonl(path, source):
        prompt = _of_row(row.values, f"{source}{row.place}")
        if prompt.category in prompts:
            raise DataError("two prompts for one category", where=f"{source}{row.place}", got=prompt.category)
        prompts[prompt.category] = prompt
    if len(prompts) == 1:
        prompts = {GENERAL: next(iter(prompts.values()))}
    if GENERAL not in prompts:
        raise DataError("no prompt for general questions", where=source, got=", ".join(prompts) or "nothing")
    return prompts


def prompt_for(prompts: Prompts, category: str) -> JudgePrompt:
    """The prompt of this category, or the general one."""
    return prompts.get(category.lower(), prompts[GENERAL])


def _own(category: str, merits: str, ask: str, style: Style) -> JudgePrompt:
    return JudgePrompt(category, _SYSTEM, _TEMPLATE, f"{merits} {_FAIR}\n{ask}", style)


def _of_row(values: dict[str, object], where: str) -> JudgePrompt:
    defaults = values.get("defaults")
    parts = {
        "system_prompt": values.get("system_prompt", ""),
        "prompt_template": values.get("prompt_template"),
        "category": values.get("category", GENERAL),
        "defaults.prompt": defaults.get("prompt") if isinstance(defaults, dict) else None,
    }
    texts: dict[str, str] = {}
    for name, value in parts.items():
        if not isinstance(value, str):
            raise DataError(f"{name} is missing or no text", where=where, got=repr(value)[:60])
        texts[name] = value
    absent = [place for place in PLACES if f"{{{place}}}" not in texts["prompt_template"]]
    if absent:
        raise DataError(
            "the prompt's template leaves something out",
            where=f"{where}: prompt_template",
            got=f"no {', '.join(f'{{{place}}}' for place in absent)}",
            allowed=" ".join(f"{{{place}}}" for place in PLACES),
        )
    wording = texts["prompt_template"] + texts["defaults.prompt"] + texts["system_prompt"]
    style = values.get("verdict", "choice" if _ASKS_FOR_A_CHOICE.search(wording) else "scores")
    if style not in ("scores", "choice"):
        raise DataError("unknown kind of verdict", where=f"{where}: verdict", got=style, allowed="scores, choice")
    return JudgePrompt(
        texts["category"].lower(),
        texts["system_prompt"],
        texts["prompt_template"],
        texts["defaults.prompt"],
        "choice" if style == "choice" else "scores",
    )
