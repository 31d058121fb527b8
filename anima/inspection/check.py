"""Reads everything and reports what training would drop, change or refuse, and what a person should look at.

Two passes: the data stage itself (what would training do?), then the texts row by row (duplicates, leakage, oddities).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from anima.config.schema import DataConfig
from anima.data.kinds import RecordKind
from anima.data.pair_formats import Unusable
from anima.data.prepare import TokenizedSet, prepare_records, split, tokenise
from anima.data.records import Conversation
from anima.data.report import SetReport, Tally
from anima.data.row_batches import row_batches
from anima.data.sources import Source, resolve
from anima.data.templates import Template
from anima.data.tokenizer import Tokenizer, special_tokens
from anima.errors import AnimaError, DataError
from anima.inspection.findings import CheckReport, Findings
from anima.inspection.near_duplicates import NearDuplicates, normalised
from anima.inspection.oddities import MEANINGS, oddities, seems_cut_off
from anima.inspection.preferences import MEANINGS as PAIR_MEANINGS
from anima.inspection.preferences import PreferenceCheck, is_preference, plain_texts

DUPLICATE = "rows said before, word for word"
NEAR = "rows that say almost what an earlier one says"
LEAK = "held-out rows that are also trained on"
LEAKED_PROMPT = "held-out questions that are also trained on"
NEAR_LEAK = "held-out rows that are almost trained on"
_MEANINGS = {
    **PAIR_MEANINGS,
    **MEANINGS,
    DUPLICATE: "each is learned several times; remove them, or mean it with a weight",
    NEAR: "five-character stretches in common; often one template filled in",
    LEAK: "the held-out loss would measure memory; take them out of one of the two",
    LEAKED_PROMPT: "the same question with another answer; the held-out loss is too good",
    NEAR_LEAK: "the held-out loss is too good",
}
_ORDER = [LEAK, LEAKED_PROMPT, NEAR_LEAK, *PAIR_MEANINGS, *MEANINGS, DUPLICATE, NEAR]
"""Findings from the gravest to the least."""


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What is looked for beside the plain counts.

    similarity: from which near duplicates are counted, 0 to 1; 0 leaves them out.
    max_near_rows: rows that are compared for near duplicates; the others are only compared for equality.
    """

    similarity: float = 0.8
    max_near_rows: int = 200_000


def check(
    kind: RecordKind[Any],
    config: DataConfig,
    tokenizer: Tokenizer,
    template: Template,
    *,
    seed: int,
    options: CheckOptions,
) -> CheckReport:
    """Check the training and held-out data of a config.

    Args:
        kind: What a row is.
        config: As for training.
        tokenizer: The model's tokenizer.
        template: The template to render with.
        seed: The run's seed, which decides the split.
        options: What is looked for.
    """
    refusal = _refusal(kind, config, tokenizer, template, seed)
    report = SetReport()
    findings, notes = Findings(), [f"template {template.name}"]
    held_out: set[str] = set()
    lenient = replace(config, bad_rows="drop", truncation="drop" if config.truncation == "error" else config.truncation)
    try:
        sets = tokenise(kind, lenient, tokenizer, template)
        held_out = _held_out(sets, config, seed)
        for name, found in zip(("train", "eval"), sets, strict=True):
            if found is not None:
                notes += [f"{name}: {line}" for line in found.report.lines()[-2:]]
                report.merge(found.report)
    except AnimaError as error:
        refusal = refusal or error
    texts = _Texts(findings, tokenizer, options)
    try:
        for place, is_eval, row, conversations in _rows(kind, lenient):
            texts.add(place, is_eval or place in held_out, row, conversations)
    except AnimaError as error:
        refusal = refusal or error
    trimmed = {"trimmed to the limits": report.trimmed} if report.trimmed.rows else {}
    return CheckReport(
        files=[*config.train_files, *config.eval_files],
        rows=max(report.rows, texts.rows),
        kept=report.kept,
        refusal=None if refusal is None else str(refusal),
        dropped={reason: _plain(tally) for reason, tally in {**report.dropped, **trimmed}.items()},
        findings=sorted(findings.found.values(), key=lambda finding: _ORDER.index(finding.name)),
        notes=[*notes, *texts.notes()],
    )


def _refusal(
    kind: RecordKind[Any], config: DataConfig, tokenizer: Tokenizer, template: Template, seed: int
) -> AnimaError | None:
    """Why training would stop, or None."""
    try:
        prepare_records(kind, config, tokenizer, seed=seed, template=template)
    except AnimaError as error:
        return error
    return None


def _held_out(sets: tuple[TokenizedSet[Any], TokenizedSet[Any] | None], config: DataConfig, seed: int) -> set[str]:
    """Places of the rows that --eval_size holds out of the training files."""
    if sets[1] is not None or not config.eval_size:
        return set()
    try:
        part = split(sets[0].dataset, config.eval_size, seed)[1]
    except DataError:
        return set()  # training refuses it, which is reported
    return set() if part is None else {part.source(i) for i in range(len(part))}


def _plain(tally: Tally) -> dict[str, object]:
    return {"rows": tally.rows, "first": tally.first}


Looked = tuple[str, bool, dict[str, object], tuple[Conversation, ...]]
"""Place of a row, whether from the held-out files, its values, and its conversations if it holds any."""


def _rows(kind: RecordKind[Any], config: DataConfig) -> Iterator[Looked]:
    """All rows that can be read."""
    for flag, names in (("train_files", config.train_files), ("eval_files", config.eval_files)):
        sources = resolve(names, flag, weights=flag == "train_files", streaming=config.hub_streaming)
        for source in sources:
            yield from _rows_of(kind, config, source, is_eval=flag == "eval_files")


def _rows_of(kind: RecordKind[Any], config: DataConfig, source: Source, *, is_eval: bool) -> Iterator[Looked]:
    first = next(source.rows(_pass_over), None)
    if first is not None and config.dataset_format == "auto" and not _fits(kind, first.values):
        for row in source.rows(_pass_over):
            yield source.name + row.place, is_eval, row.values, ()
        return
    for batch in row_batches(config, kind.detect, [source], SetReport()):
        for row in batch.rows:
            place = source.name + row.place
            try:
                found = kind.read(row.values, batch.layout, place)
            except DataError:
                found = Unusable("counted by the data stage")
            yield place, is_eval, row.values, () if isinstance(found, Unusable) else found


def _pass_over(error: DataError, place: str) -> None:
    """Rows that cannot be read are counted by the data stage."""


def _fits(kind: RecordKind[Any], row: dict[str, object]) -> bool:
    """Whether a row is of this kind; others are only looked at as they are."""
    try:
        kind.detect(row, "")
    except DataError:
        return False
    return kind.last_answer_only or not is_preference(row)


class _Texts:
    """What the texts of all rows show."""

    def __init__(self, findings: Findings, tokenizer: Tokenizer, options: CheckOptions) -> None:
        self._findings = findings
        self._special = sorted(special_tokens(tokenizer))
        self._options = options
        self._near = NearDuplicates(options.similarity) if options.similarity > 0 else None
        self._preferences = PreferenceCheck(findings)
        self._places: list[str] = []
        self._is_eval: list[bool] = []
        self._whole: dict[bytes, int] = {}
        self._prompts: tuple[dict[bytes, int], dict[bytes, int]] = ({}, {})
        self.rows = 0

    def add(self, place: str, is_eval: bool, row: dict[str, object], conversations: tuple[Conversation, ...]) -> None:
        """Look at one row; `is_eval` if it is held out."""
        number = self.rows
        self.rows += 1
        self._places.append(place)
        self._is_eval.append(is_eval)
        if is_preference(row):
            self._preferences.add(row, place)
        if not conversations:
            texts = [str(value) for value in row.values() if isinstance(value, str)]
            texts = plain_texts(row) if is_preference(row) else texts or [_as_json(row)]
            self._look(place, texts)
            self._compare(number, texts, texts[:1] if is_preference(row) else [])
            return
        prompt = [message.text for message in conversations[0].messages[:-1]]
        texts = [*prompt, *(conversation.messages[-1].text for conversation in conversations)]
        self._look(place, texts)
        cut_off = [m.content for m in conversations[0].messages if m.role == "assistant" and seems_cut_off(m.content)]
        if cut_off:
            self._note("answers that seem cut off", place, repr(cut_off[0].rstrip()[-40:]))
        self._compare(number, texts, prompt)

    def notes(self) -> list[str]:
        """Figures in words."""
        left_out = self.rows - self._options.max_near_rows
        skipped = [f"near duplicates were looked for in the first {self._options.max_near_rows:,} rows only"]
        return [*self._preferences.notes(), *(skipped if self._near is not None and left_out > 0 else [])]

    def _look(self, place: str, texts: list[str]) -> None:
        found: dict[str, str] = {}
        for text in texts:
            found = {**oddities(text), **found}
            special = next((token for token in self._special if len(token) > 3 and token in text), None)
            if special is not None:
                found.setdefault("special tokens of the tokenizer", special)
        for name, detail in found.items():
            self._note(name, place, detail)

    def _compare(self, number: int, texts: list[str], prompt_texts: list[str]) -> None:
        place, is_eval = self._places[number], self._is_eval[number]
        text = normalised("\n".join(texts))
        earlier = self._whole.setdefault(_digest(text), number)
        question = normalised("\n".join(prompt_texts))
        prompt = _digest(question)
        self._prompts[is_eval].setdefault(prompt, number)
        if earlier != number:
            leaks = self._is_eval[earlier] != is_eval
            self._note(LEAK if leaks else DUPLICATE, place, f"= {self._places[earlier]}")
            return
        other = self._prompts[not is_eval].get(prompt)
        if other is not None and question:
            self._note(LEAKED_PROMPT, place, f"= {self._places[other]}")
        if self._near is None or number >= self._options.max_near_rows:
            return
        similar = self._near.find_and_add(number, text)
        across = [(key, share) for key, share in similar if self._is_eval[key] != is_eval]
        if across and other is None:
            self._note(NEAR_LEAK, place, f"~ {self._places[across[0][0]]} ({across[0][1]:.2f})")
        elif similar:
            self._note(NEAR, place, f"~ {self._places[similar[0][0]]} ({similar[0][1]:.2f})")

    def _note(self, name: str, place: str, detail: str = "") -> None:
        self._findings.add(name, _MEANINGS[name], place, detail)


def _as_json(row: dict[str, object]) -> str:
    """A row whose texts lie deeper, such as messages where pairs were expected."""
    return json.dumps(row, ensure_ascii=False, sort_keys=True, default=str)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=12).digest()
