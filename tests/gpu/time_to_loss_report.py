"""What the runs of time_to_loss.py measured, and what it says about them."""

from dataclasses import dataclass
from typing import Any

WARM_UP_STEPS = 3
"""Kernels are compiled in them: charged at the mean of the others."""


@dataclass
class Curve:
    """What one run measured."""

    kind: str
    steps: list[int]
    """Where an adapter was saved; 0 first."""
    seconds: list[float]
    """Of training up to there, warm-up at the usual pace."""
    tokens: list[int]
    """Trained on up to there."""
    adapters: list[str]
    first_loss: float
    """Training loss of step 1, before any update."""
    step_tokens: list[int]
    step_seconds: float
    warm_up_seconds: float
    """Real seconds of the first steps."""
    wall_seconds: float
    """Of the process behind its imports: loading, training, saving; 0 if an earlier command ran it."""
    held_out: list[float]


def reach(values: list[Any], losses: list[float], target: float) -> float | None:
    """Where the loss first meets the target, on a straight line between measurements; None if it never does."""
    for i in range(1, len(losses)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i]) if losses[i - 1] > target else 0.0
            return float(values[i - 1] + share * (values[i] - values[i - 1]))
    return None


def report(curves: list[Curve], target: float | None) -> dict[str, Any]:
    """Tables, and whether the runs really did the same; without a target 1.02 x the worst final loss."""
    target = target or 1.02 * max(one.held_out[-1] for one in curves)
    print(f"\nheld-out loss by step, from {curves[0].held_out[0]:.4f}\n| step | ", end="")
    print(" | ".join(one.kind for one in curves), f"|\n|{'---|' * (len(curves) + 1)}")
    for i, step in enumerate(curves[0].steps):
        print(f"| {step} | {' | '.join(f'{one.held_out[i]:.4f}' for one in curves)} |")
    print(f"\n| | loss of step 1 | s a step | tokens/s | final | seconds to {target:.4f} | tokens | ", end="")
    print(f"times {curves[0].kind} | first {WARM_UP_STEPS} steps, s |\n|{'---|' * 9}")
    reached = {}
    first = reach(curves[0].seconds, curves[0].held_out, target)
    for one in curves:
        seconds, tokens = (reach(values, one.held_out, target) for values in (one.seconds, one.tokens))
        reached[one.kind] = {"seconds": seconds, "tokens": tokens}
        shown = "never | | " if seconds is None or tokens is None else f"{seconds:.1f} | {tokens:,.0f} | "
        times = f"{seconds / first:.2f}" if seconds and first else ""
        print(
            f"| {one.kind} | {one.first_loss:.4f} | {one.step_seconds:.3f} | {one.tokens[-1] / one.seconds[-1]:,.0f} | "
            f"{one.held_out[-1]:.4f} | {shown}{times} | {one.warm_up_seconds:.1f} |"
        )
    same = {one.kind: one.step_tokens == curves[0].step_tokens for one in curves}
    print(f"tokens of every step as in {curves[0].kind}: {same}", flush=True)
    return {"target": target, "reached": reached, "same_step_tokens": same}
