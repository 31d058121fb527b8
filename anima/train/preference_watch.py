"""The classic failures of preference training, told in plain words while it runs."""

from collections.abc import Mapping

FALLS = 3
"""Evaluations in a row with both log-probabilities falling before it is said."""


class PreferenceWatch:
    """Looks at held-out metrics, evaluation after evaluation.

    Args:
        longer_wins: Held-out accuracy of preferring the longer answer.
    """

    def __init__(self, longer_wins: float) -> None:
        self._longer_wins = longer_wins
        self._last: tuple[float, float] | None = None
        self._falls = 0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What a person should be told after the evaluation at `step`."""
        chosen, rejected = metrics["logps/chosen"], metrics["logps/rejected"]
        accuracy = metrics["rewards/accuracies"]
        margin = metrics["rewards/margins"]
        tied = " (policy and reference are the same: every pair is a tie, which counts as wrong)" if margin == 0 else ""
        lines = [
            f"step {step}: held-out accuracy {accuracy:.2f}{tied}, margin {margin:.3f}, "
            f"log-probabilities chosen {chosen:.2f}, rejected {rejected:.2f}"
        ]
        if self._last is not None:
            fell = chosen < self._last[0] and rejected < self._last[1]
            self._falls = self._falls + 1 if fell else 0
        self._last = (chosen, rejected)
        if self._falls >= FALLS:
            lines.append(
                f"step {step}: both log-probabilities fell in {self._falls} evaluations in a row: the policy unlearns "
                "the chosen answers too. Try a lower --learning_rate, a higher --beta, or --sft_weight 0.2"
            )
        return lines + self._length_lines(step, accuracy, metrics.get("rewards/accuracies_chosen_shorter"))

    def _length_lines(self, step: int, accuracy: float, where_shorter: float | None) -> list[str]:
        """Whether length alone would explain the accuracy."""
        if step == 0 or accuracy < 0.6 or accuracy > self._longer_wins + 0.05:
            return []
        if where_shorter is None:
            return [
                f"step {step}: the chosen answer is never the shorter one in the held-out pairs, so their accuracy "
                "does not tell whether anything but length was learned"
            ]
        if where_shorter >= 0.5:
            return []
        return [
            f"step {step}: length alone explains the held-out accuracy: preferring the longer answer gives "
            f"{self._longer_wins:.2f}, and where the chosen answer is the shorter one only {where_shorter:.0%} are "
            "right. Balance the lengths of the data, or try --length_normalize True"
        ]
