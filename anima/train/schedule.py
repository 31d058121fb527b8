"""The learning rate as a pure function of the step. No state, so a resumed run cannot drift."""

import math


def learning_rate_at(step: int, *, peak: float, num_steps: int, warmup_ratio: float, kind: str) -> float:
    """Learning rate of optimizer step `step` (1-based).

    Warm-up: linear from 0, reaching `peak` at step ceil(warmup_ratio * num_steps), which also holds for
    `constant`. After it, with t running from 0 at the end of warm-up to 1 at the last step:
    constant peak; linear peak * (1 - t); cosine peak * (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017, eq. 5).
    The last step of a decaying schedule still learns: t counts one step beyond the last.

    Args:
        step: 1 to num_steps.
        peak: Highest learning rate.
        num_steps: Optimizer steps of the run.
        warmup_ratio: Share of the steps that warm up, 0 to 1.
        kind: constant, linear or cosine.
    """
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    if step <= warmup_steps:
        return peak * step / warmup_steps
    t = (step - 1 - warmup_steps) / max(1, num_steps - warmup_steps)
    if kind == "linear":
        return peak * (1 - t)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * t))
    return peak
