"""Reads a judge's text as a person would: two scores, or a choice between first, second and tie.

When in doubt it reads nothing: two places that contradict each other are unparsable, never scored. Knows no files.
"""

import re
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["first", "second", "tie"]
Style = Literal["scores", "choice"]

MAX_SCORE = 10.0
"""Highest score on the scale that judges are asked for; a number beyond it is no score."""
_CHOICES: dict[str, Outcome] = {"1": "first", "2": "second", "3": "tie", "A": "first", "B": "second", "C": "tie"}

_NUMBER = r"(\d+(?:\.\d+)?)"
_SCORE = _NUMBER + r"(?:\s*/\s*10(?![\d.]))?(?:\s+out\s+of\s+10\b)?"
_WHO = r"(?:Assistant|Asistente|助手)"
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FIRST_LINE = re.compile(rf"{_SCORE}[\s,]+{_SCORE}")
_LAST_LINE = re.compile(rf"(?:final\s+)?scores?\s*[:：]\s*{_SCORE}[\s,]+{_SCORE}\.?", re.IGNORECASE)
# A pair in parentheses is a verdict where it is announced or the last line; elsewhere it may be a point in a plane.
_PAIR = rf"\(\s*{_SCORE}\s*,\s*{_SCORE}\s*\)(?=[.,;]?(?:\s|$))"
_TUPLE = re.compile(rf"(?:output|tuple|scores?)\b[^.\n(]*[:\s]{_PAIR}|^{_PAIR}\.?\Z", re.IGNORECASE | re.MULTILINE)
# "Assistant 1: 7/10 (…)", "Assistant 1 a score of 7", "Assistant 1's answer … score: 7/10" within one line; the number
# must be followed by what follows a score, so that "Assistant 1: 3x = 5" is none.
_LABELLED = re.compile(
    rf"{_WHO}\s*([12])\b(?:'s (?:answer|response))?"
    rf"(?: *[:：] *| +(?:a +)?(?:score +of +)?(?:as +)?|(?:(?!{_WHO})[^\n])*?\bscore *(?::|of) *)"
    rf"{_SCORE}(?=\s*(?:$|[,;()–—-]|\.(?:\s|$)|(?:and|while|for|due|points?)\b))",
    re.MULTILINE | re.IGNORECASE,
)
_BOTH = re.compile(rf"\bboth\b[^.\n]{{0,60}}?\ba\s+score\s+of\s+{_SCORE}(?=\W|$)", re.IGNORECASE)

_BARE_CHOICE = re.compile(r"[\[(]*([123])[\])]*\.?")
_LETTER = re.compile(r"\[\[([ABC])\]\]")
_REFUSAL = re.compile(
    r"\b(?:can\s?not|can't|could not|couldn't|unable to|not able to|don't|do not|not|never)\s+(?:\w+\s+)?"
    r"(?:choose|pick|select|determine|decide)",
    re.IGNORECASE,
)
_BEST = r"\b(?:best|better|winning|mejor|лучший|лучше)\s+(?:answer|response|assistant|respuesta|ответ)"
_STRAIGHT = rf"(?:(?!\b(?:not|neither|no)\b|{_WHO})[^.;])*?\b"
"""On to the next assistant's name, past no negation."""
_CHOICE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?:{_BEST}|最佳(?:答案|回答)|更好的(?:答案|回答))\s*(?:is|es|是)?\s*[:：—-]*\s*(?:option\s+|number\s+)?([123])\s*[.。]?$",
        rf"{_BEST}\b[^.;]*?\b(?:is|es|to be)\b{_STRAIGHT}{_WHO}\s*([12])\b(?!\s*(?:and|or|y|o)\b)",
        r"\bchoose\s+(?:(?:option|number|answer)\s+)?\W?([123])\b(?!\s*(?:and|or)\b)",
        rf"\bchoose\s+(?:the\s+(?:answer|response)\s+(?:of|by|from)\s+)?{_WHO}\s*([12])\b(?!\s*(?:and|or)\b)",
        rf"\b(?:final\s+)?(?:verdict|choice|answer|output|winner)\s*[:：]\s*(?:option\s+)?(?:{_WHO}\s*)?([123])\s*\.?$",
    )
)


@dataclass(frozen=True)
class Reading:
    """What a verdict says: who is better, and the two scores where it gave any. `outcome` None: unparsable."""

    outcome: Outcome | None
    scores: tuple[float, float] | None = None


def read_verdict(text: str, style: Style, *, cut_off: bool = False) -> Reading:
    """The verdict in a judge's text.

    Args:
        text: All that the judge wrote; thoughts between <think> tags are passed over.
        style: Whether two scores or a choice of 1, 2, 3 (tie) was asked for.
        cut_off: The text ended at the token limit: its last line is no last line, and only scores in the first count.
    """
    text = _THOUGHTS.sub("", text).strip()
    if cut_off:
        text = text.splitlines()[0] if style == "scores" and "\n" in text else ""
    if style == "choice":
        return Reading(read_choice(text))
    scores = read_scores(text)
    if scores is None:
        return Reading(None)
    first, second = scores
    return Reading("first" if first > second else "second" if second > first else "tie", scores)


def read_scores(text: str) -> tuple[float, float] | None:
    """Scores of the first and the second answer; None where the text gives none, or gives two that differ.

    A first line of exactly two numbers, as the judge was asked for, decides. Otherwise every other form is looked for:
    a closing line, a pair in parentheses, one score a labelled assistant, one score for both.
    """
    lines = [_plain(line) for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    if match := _FIRST_LINE.fullmatch(lines[0]):
        return _in_range(match[1], match[2])
    found = set()
    if match := _LAST_LINE.fullmatch(lines[-1]) or _FIRST_LINE.fullmatch(lines[-1]):
        found.add((float(match[1]), float(match[2])))
    joined = "\n".join(lines)
    if tuples := _TUPLE.findall(joined):
        first, second = (float(value) for value in tuples[-1] if value)
        found.add((first, second))
    labelled = {who: float(score) for who, score in _LABELLED.findall(joined)}
    if len(labelled) == 2:
        found.add((labelled["1"], labelled["2"]))
    if not found and (both := _BOTH.findall(joined)):
        found.add((float(both[-1]), float(both[-1])))
    if len(found) != 1:
        return None
    first, second = found.pop()
    return _in_range(first, second)


def read_choice(text: str) -> Outcome | None:
    """The choice in the last line that holds anything: a bare number, `[[A]]`, or a sentence that names one answer.

    A sentence that says it cannot choose, or names two, is no choice.
    """
    lines = [_plain(line) for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    last = lines[-1]
    if match := _BARE_CHOICE.fullmatch(last):
        return _CHOICES[match[1]]
    found = {_CHOICES[letter] for letter in _LETTER.findall(last)}
    for sentence in re.split(r"(?<=[.。!?])\s+", last):
        if not _REFUSAL.search(sentence):
            found |= {_CHOICES[value] for pattern in _CHOICE for value in pattern.findall(sentence)}
    return found.pop() if len(found) == 1 else None


def _plain(line: str) -> str:
    """A line without the marks of Markdown that judges put around their verdict."""
    return re.sub(r"[*_`#>]+", "", line).strip().strip("\"'“”")


def _in_range(first: str | float, second: str | float) -> tuple[float, float] | None:
    scores = float(first), float(second)
    return scores if max(scores) <= MAX_SCORE else None
