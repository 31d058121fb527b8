"""What preparing the data found: counts by reason with the first places, tokens, cache; as lines for people.

Knows no data, only its numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FIRST_PLACES = 3


@dataclass(slots=True)
class Tally:
    """How often something happened, and the first rows it happened to."""

    rows: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, file: int, place: str) -> None:
        """Count one more. While a set is read, `first` holds the number of the file in place of its name."""
        self.rows += 1
        if len(self.first) < FIRST_PLACES:
            self.first.append(f"{file}{place}")

    def merge(self, later: "Tally") -> None:
        """Add what was counted in later rows."""
        self.rows += later.rows
        self.first += later.first[: FIRST_PLACES - len(self.first)]

    def named(self, names: Sequence[str]) -> "Tally":
        """The same with the names of the files."""
        parts = [place.partition(":") for place in self.first]
        return Tally(self.rows, [f"{names[int(file)]}:{rest}" for file, _, rest in parts])

    def __str__(self) -> str:
        more = ", ..." if self.rows > len(self.first) else ""
        return f"{self.rows} ({', '.join(self.first)}{more})" if self.rows else "0"


@dataclass(slots=True)
class SetReport:
    """One set of files, tokenised."""

    files: list[str] = field(default_factory=list)
    rows: int = 0
    """Rows read."""
    kept: int = 0
    """Sequences, or pairs, that came of them."""
    dropped: dict[str, Tally] = field(default_factory=dict)
    """By reason."""
    trimmed: Tally = field(default_factory=Tally)
    """Kept after the user's text was shortened."""
    formats: dict[str, int] = field(default_factory=dict)
    """Rows by layout."""
    tokens: int = 0
    supervised_tokens: int = 0
    """Tokens that carry loss; the first of a sequence never does."""
    longest: int = 0
    """Tokens of the longest sequence."""
    answers: int = 0
    stopped_answers: int = 0
    """Answers whose last supervised token is a stop token."""

    def drop(self, reason: str, file: int, place: str) -> None:
        """Count a row that is left out."""
        self.dropped.setdefault(reason, Tally()).add(file, place)

    def merge(self, later: "SetReport") -> None:
        """Add what was counted in later rows."""
        self.rows += later.rows
        self.kept += later.kept
        for reason, tally in later.dropped.items():
            self.dropped.setdefault(reason, Tally()).merge(tally)
        self.trimmed.merge(later.trimmed)
        for name, rows in later.formats.items():
            self.formats[name] = self.formats.get(name, 0) + rows
        self.tokens += later.tokens
        self.supervised_tokens += later.supervised_tokens
        self.longest = max(self.longest, later.longest)
        self.answers += later.answers
        self.stopped_answers += later.stopped_answers

    def to_json(self) -> dict[str, Any]:
        """For the cache, which may be used by the same files under other names."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], names: Sequence[str]) -> "SetReport":
        """The report of a cached set; `names` are those of the files as they are called now."""
        dropped = {reason: Tally(**tally).named(names) for reason, tally in values["dropped"].items()}
        trimmed = Tally(**values["trimmed"]).named(names)
        return cls(**{**values, "files": list(names), "dropped": dropped, "trimmed": trimmed})

    def lines(self) -> list[str]:
        """For people: what was read, what was dropped and why."""
        formats = ", ".join(f"{name} {rows}" for name, rows in self.formats.items())
        share = self.supervised_tokens / max(1, self.tokens)
        stopped = self.stopped_answers / max(1, self.answers)
        return [
            f"rows {self.rows:,} ({formats}), kept {self.kept:,}",
            *(f"dropped, {reason}: {tally}" for reason, tally in self.dropped.items()),
            *([f"trimmed: {self.trimmed}"] if self.trimmed.rows else []),
            f"tokens {self.tokens:,}, {share:.0%} supervised, longest sequence {self.longest:,}",
            f"answers {self.answers:,}, {stopped:.0%} end in a supervised stop token",
        ]


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """Where a tokenised set lies."""

    key: str
    path: str
    reused: bool


@dataclass(frozen=True, slots=True)
class PreparationReport:
    """Everything that `prepare` found."""

    template: str
    train: SetReport
    train_cache: CacheEntry
    train_rows: int
    """Sequences to train on, after the split."""
    eval: SetReport | None
    """Of --eval_files; None when the held-out set is a part of the training files, or there is none."""
    eval_cache: CacheEntry | None
    eval_rows: int
    unit: str = "sequences"
    """What is counted, in the plural."""
    notes: tuple[str, ...] = ()
    """What a person should know before training."""
    mixture: tuple[str, ...] = ()
    """What the weights of the training files mean, a line a file; empty where each row occurs once an epoch."""

    def lines(self) -> list[str]:
        """For people, without colours."""
        lines = [f"template {self.template}"]
        sets: Sequence[tuple[str, SetReport | None, CacheEntry | None]] = (
            ("train", self.train, self.train_cache),
            ("eval", self.eval, self.eval_cache),
        )
        for name, found, cache in sets:
            if found is not None and cache is not None:
                lines += [f"{name}: {line}" for line in (f"files {', '.join(found.files)}", *found.lines())]
                lines.append(f"{name}: {'reused' if cache.reused else 'built'} {cache.path}")
        lines += [f"train: mixture, {line}" for line in self.mixture]
        return [*lines, *self.notes, f"{self.unit} to train on {self.train_rows:,}, held out {self.eval_rows:,}"]
