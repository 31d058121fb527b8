"""What a check found: counts by name with the first places, for people and for machines. Knows no data."""

from dataclasses import dataclass, field
from typing import Any

MAX_PLACES = 5
"""Places that are kept of each finding."""


@dataclass(slots=True)
class Finding:
    """One kind of thing that a person should look at.

    meaning: what it is and what to do. places: the first rows, as `file:line`, each with what was found there.
    """

    name: str
    meaning: str
    rows: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, place: str, detail: str = "") -> None:
        """Count one more row."""
        self.rows += 1
        if len(self.places) < MAX_PLACES:
            self.places.append(f"{place} {detail}".rstrip())


@dataclass(slots=True)
class Findings:
    """Findings by name, in the order in which they first came up."""

    found: dict[str, Finding] = field(default_factory=dict)

    def add(self, name: str, meaning: str, place: str, detail: str = "") -> None:
        """Count a row under a name."""
        self.found.setdefault(name, Finding(name, meaning)).add(place, detail)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Everything that a check found.

    refusal: why training would stop before it begins, with the way out; None if it would start.
    dropped: rows that training leaves out or changes, by reason: {"rows": n, "first": places}.
    notes: figures in words.
    """

    files: list[str]
    rows: int
    kept: int
    refusal: str | None
    dropped: dict[str, dict[str, Any]]
    findings: list[Finding]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "would_train": self.refusal is None,
            "refusal": self.refusal,
            "files": self.files,
            "rows": self.rows,
            "kept": self.kept,
            "dropped_or_changed": self.dropped,
            "findings": [
                {"name": f.name, "rows": f.rows, "share": f.rows / max(1, self.rows), "places": f.places}
                for f in self.findings
            ],
            "notes": self.notes,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{len(self.files)} file(s): {', '.join(self.files)}", *self.notes]
        if self.dropped:
            lines += ["", "Left out or changed:"]
            for reason, tally in self.dropped.items():
                lines.append(f"  {tally['rows']:>8,}  {reason}")
                lines += [f"            {place}" for place in tally["first"]]
        lines += ["", "Worth a look:" if self.findings else "Nothing odd was found in the texts."]
        for finding in self.findings:
            lines.append(
                f"  {finding.rows:>8,}  {finding.name} ({finding.rows / max(1, self.rows):.1%}): {finding.meaning}"
            )
            lines += [f"            {place}" for place in finding.places]
        if self.refusal is None:
            return [*lines, "", f"Training would start, on {self.kept:,} of {self.rows:,} rows."]
        return [*lines, "", "Training would refuse this data:", *(f"  {line}" for line in self.refusal.splitlines())]
