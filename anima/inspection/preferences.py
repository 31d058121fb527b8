"""Preference rows (`chosen`, `rejected`) as raw texts: equal answers, different prompts, length bias.

Reads the row itself, whatever layout it has, so that it judges rows that training would drop as well.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anima.inspection.findings import Findings

_SPEAKER = re.compile(r"(?:^|\n\n)(?:Human|Assistant):")
MEANINGS = {
    "chosen equal to rejected": "no preference in the row; its loss is constant",
    "an empty answer": "chosen or rejected holds no text",
    "prompt mismatch": "chosen and rejected answer different prompts, so that they cannot be compared",
    "an earlier prompt with the answers swapped": "the two rows contradict each other",
}


@dataclass(frozen=True, slots=True)
class RawPair:
    """The two answers with the prompts that stand in the same fields, as text."""

    prompts: tuple[str, str]
    chosen: str
    rejected: str


def is_preference(row: Mapping[str, object]) -> bool:
    """Whether a row holds a preference."""
    return "chosen" in row and "rejected" in row


def raw_pair(row: Mapping[str, object]) -> RawPair:
    """Prompts and answers of a preference row in any of the usual shapes."""
    shared = _text(row.get("prompt") or row.get("conversations") or "")
    (chosen_prompt, chosen), (rejected_prompt, rejected) = _parts(row["chosen"]), _parts(row["rejected"])
    return RawPair((shared + chosen_prompt, shared + rejected_prompt), chosen, rejected)


def plain_texts(row: Mapping[str, object]) -> list[str]:
    """The texts of a preference row without the names of speakers that hh-rlhf writes into them."""
    pair = raw_pair(row)
    return [_SPEAKER.sub("\n", text) for text in (*pair.prompts, pair.chosen, pair.rejected)]


class PreferenceCheck:
    """Collects what is odd about preference rows."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._lengths: list[tuple[int, int]] = []
        self._seen: dict[int, str] = {}

    def add(self, row: Mapping[str, object], place: str) -> None:
        """Look at one row."""
        pair = raw_pair(row)
        self._lengths.append((len(pair.chosen), len(pair.rejected)))
        if not pair.chosen.strip() or not pair.rejected.strip():
            self._note("an empty answer", place)
        if pair.chosen.strip() == pair.rejected.strip():
            self._note("chosen equal to rejected", place)
        if pair.prompts[0].strip() != pair.prompts[1].strip():
            self._note("prompt mismatch", place)
        swapped = self._seen.get(hash((pair.prompts[0], pair.rejected, pair.chosen)))
        if swapped is not None and pair.chosen != pair.rejected:
            self._note("an earlier prompt with the answers swapped", place, f"= {swapped}")
        self._seen.setdefault(hash((pair.prompts[0], pair.chosen, pair.rejected)), place)

    def notes(self) -> list[str]:
        """Length bias in words; nothing without rows."""
        if not self._lengths:
            return []
        chosen, rejected = np.array(self._lengths).T
        longer, equal = float(np.mean(chosen > rejected)), float(np.mean(chosen == rejected))
        return [
            f"preferences {len(chosen):,}: chosen is longer in {longer:.0%}, equally long in {equal:.0%}; characters "
            f"on average {chosen.mean():,.0f} against {rejected.mean():,.0f}. Whoever only prefers length is right in "
            f"{max(longer, 1 - longer - equal) + equal / 2:.0%}"
            + (": the model may learn length instead of quality" if max(longer, 1 - longer - equal) > 0.7 else "")
        ]

    def _note(self, name: str, place: str, detail: str = "") -> None:
        self._findings.add(name, MEANINGS[name], place, detail)


def _parts(value: object) -> tuple[str, str]:
    """What stands before the last answer, and the answer: of a text (perhaps a dialogue), a message, or messages."""
    if isinstance(value, list):
        return _text(value[:-1]), _text(value[-1:])
    text = _text(value)
    head, mark, tail = text.rpartition("\n\nAssistant:")
    return (head, tail) if mark else ("", text)


def _text(value: object) -> str:
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if isinstance(value, Mapping):
        return str(value.get("content") or value.get("value") or "")
    return value if isinstance(value, str) else ""
