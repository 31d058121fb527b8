"""Multiple-choice questions in the ancestor's layout: read, made few-shot, cut to a length without losing the question.

A row is {"subject", "input" (ends in "Answer:"), "output" (a letter)}. Knows text and token ids, no network.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from anima.config.paths import expanded
from anima.data.json_rows import read_json, read_jsonl
from anima.data.tokenizer import Tokenizer, adds_bos, tokenize
from anima.errors import DataError

LETTERS = ("A", "B", "C", "D")
_SOLVED = re.compile(r"\nAnswer: ?[A-D]$")


@dataclass(frozen=True, slots=True)
class Choice:
    """One question with its solved examples in front, if any."""

    subject: str
    input: str
    output: str


def read_choices(path: str) -> list[Choice]:
    """All questions of a file, JSON list or JSON lines.

    Raises:
        DataError: no such file, no question, or a row of another layout.
    """
    file = expanded(path)
    if not file.is_file():
        raise DataError("no such file of questions", where=path, fix="check the path")
    choices = []
    for row in read_jsonl(file, path) if file.suffix == ".jsonl" else read_json(file, path):
        texts = {name: row.values.get(name) for name in ("subject", "input", "output")}
        wrong = [name for name, text in texts.items() if not isinstance(text, str) or not text]
        if wrong or texts["output"] not in LETTERS or not str(texts["input"]).rstrip().endswith("Answer:"):
            raise DataError(
                "this is no multiple-choice question",
                where=f"{path}{row.place}",
                got=f"{', '.join(wrong)} missing" if wrong else f"output {texts['output']!r}",
                allowed='{"subject": …, "input": "… Answer:", "output": "A" to "D"}',
            )
        choices.append(Choice(str(texts["subject"]), str(texts["input"]).rstrip(), str(texts["output"])))
    if not choices:
        raise DataError("the file holds no question", where=path)
    return choices


def spread(choices: Sequence[Choice], number: int | None) -> list[Choice]:
    """`number` of them, evenly spread, so that all subjects have their share."""
    if number is None or number >= len(choices):
        return list(choices)
    return [choices[index * len(choices) // number] for index in range(number)]


def few_shot(choices: Sequence[Choice], examples: Sequence[Choice], shots: int) -> list[Choice]:
    """Put `shots` solved examples of its subject before each question, as the benchmark does it.

    Raises:
        DataError: a subject has too few examples.
    """
    by_subject: dict[str, list[Choice]] = defaultdict(list)
    for example in examples:
        by_subject[example.subject].append(example)
    found = []
    for choice in choices:
        head, _, body = choice.input.partition("\n\n")
        usable = [e for e in by_subject[choice.subject] if e.input != choice.input][:shots]
        if len(usable) < shots:
            raise DataError(
                "a subject has too few examples",
                where=f"--mmlu_examples: {choice.subject}",
                got=len(usable),
                allowed=f"{shots} beside the question itself",
            )
        solved = [f"{e.input.partition(chr(10) * 2)[2]} {e.output}" for e in usable]
        found.append(Choice(choice.subject, "\n\n".join([head, *solved, body]), choice.output))
    return found


@dataclass(frozen=True, slots=True)
class EncodedChoice:
    """A question as token ids, ready to be scored: the letters' logits stand at its last position."""

    ids: tuple[int, ...]
    answer: int
    shortened: bool


class ChoiceEncoder:
    """Token ids as the ancestor's evaluation had them, with two mends.

    BOS opens the text where the tokenizer adds it by default. A prompt over the limit loses solved examples from the
    front, then text from its start, and never the question (defect B12).

    Args:
        tokenizer: The model's tokenizer.
        max_tokens: Longest prompt.

    Raises:
        DataError: two letters are the same token.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._limit = max_tokens
        self._bos = [int(str(tokenizer.convert_tokens_to_ids(str(tokenizer.bos_token))))] if adds_bos(tokenizer) else []
        self.letters = tuple(ids[0] for ids in tokenize(tokenizer, list(LETTERS)))
        self.eos = int(str(tokenizer.convert_tokens_to_ids(str(tokenizer.eos_token))))
        if len(set(self.letters)) < len(LETTERS):
            raise DataError("the tokenizer does not tell the letters apart", where="tokenizer", got=self.letters)

    def encode(self, choice: Choice) -> EncodedChoice:
        """One question."""
        ids, shortened = self._ids(choice.input), False
        head, examples, question = _parts(choice.input)
        while len(ids) > self._limit and examples:
            examples, shortened = examples[1:], True
            ids = self._ids("\n\n".join([head, *examples, question]))
        if len(ids) > self._limit:
            ids, shortened = [*self._bos, *ids[len(self._bos) - self._limit :]], True
        return EncodedChoice(tuple(ids), LETTERS.index(choice.output), shortened)

    def _ids(self, text: str) -> list[int]:
        return [*self._bos, *tokenize(self._tokenizer, [text])[0]]


def _parts(text: str) -> tuple[str, list[str], str]:
    """Introduction, solved examples, question."""
    head, _, rest = text.partition("\n\n")
    examples, piece = [], ""
    for block in rest.split("\n\n"):
        piece = f"{piece}\n\n{block}" if piece else block
        if _SOLVED.search(piece):
            examples.append(piece)
            piece = ""
    return head, examples, piece


def summarise(choices: Sequence[Choice], scores: Sequence[tuple[bool, float]]) -> dict[str, float]:
    """Accuracy over all subjects, equally weighted as in the ancestor's, and of each; the loss of letter and EOS.

    Args:
        choices: What was asked.
        scores: For each question whether the right letter was the likeliest, and its loss.
    """
    by_subject: dict[str, list[bool]] = defaultdict(list)
    for choice, (right, _) in zip(choices, scores, strict=True):
        by_subject[choice.subject].append(right)
    accuracies = {subject: sum(found) / len(found) for subject, found in sorted(by_subject.items())}
    return {
        "accuracy": sum(accuracies.values()) / len(accuracies),
        "accuracy_by_question": sum(right for right, _ in scores) / len(scores),
        "loss": sum(loss for _, loss in scores) / len(scores),
        **{f"accuracy/{subject}": value for subject, value in accuracies.items()},
    }
