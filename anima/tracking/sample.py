"""One question with the model's answer, as it goes to trackers and into the summary."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """What the model answered to one question."""

    prompt: str
    answer: str
    label: str = ""
    """Which model or moment answered, where that is not plain from the step."""
