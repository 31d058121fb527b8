"""The heaviest micro-batch of the run, before the first step: a run that starts does not die of memory at step 4,000.

Also what a user reads when the memory does not suffice. Changes no number of the training that follows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from anima import distributed
from anima.errors import OutOfMemory
from anima.model.recompute import host_memory_refusal
from anima.train import faults
from anima.train.discarded import discarded, release, run_pass
from anima.train.run import Run

GIB = 2**30
_SMALLER = 0.75
"""Share of the tokens that is proposed after running out of memory."""


def rehearse(run: Run) -> Run:
    """Forward and backward of the heaviest micro-batch, twice, as if it were a step. A collective.

    Twice, so that the second finds the first one's gradients. The moments that the first real step will create are
    stood in for by an empty tensor of their size. Where a plan of --recompute auto does not fit, a smaller one is next.

    Returns:
        The run, with the plan that fits.

    Raises:
        OutOfMemory: it does not fit; the same on every rank.
    """
    failure = _failure(run)
    if failure is not None and run.fitted.smaller is not None:
        run = replace(run, fitted=run.fitted.smaller())
        run.progress.message(f"{failure.what}; once more with 10 % less memory")
        run.progress.message(run.plan.why)
        failure = _failure(run)
    if failure is not None:
        raise failure
    return run


def _failure(run: Run) -> OutOfMemory | None:
    """What is wrong, or None after having told that it fits."""
    engine, batch = run.engine, run.steps.heaviest(run.num_steps, num_train_epochs=run.num_train_epochs)
    when = "before the first step, at the heaviest micro-batch of the run"
    try:
        with discarded(engine):
            moments = _passes(run, batch)
            if moments is None:
                release(engine.device)
            mine = None if moments is not None else out_of_memory(run, [batch], when)
            failures = [failure for failure in distributed.gather_objects(mine) if failure is not None]
            moments = None if failures else moments
        del moments
    except torch.OutOfMemoryError as error:
        raise out_of_memory(run, [batch], when) from error
    run.probe.forget()
    if failures:
        failures[0].on_every_rank = True
        return failures[0]
    tokens = sum(batch.document_lengths)
    run.progress.message(f"heaviest micro-batch of the run: {tokens:,} tokens; it fits{_peak(run, tokens)}")
    return None


def _passes(run: Run, batch: Any) -> torch.Tensor | None:  # noqa: ANN401  (a micro-batch)
    """What stands in for the moments, after both passes; None if memory did not suffice."""
    device = run.engine.device
    if run.plan.peak is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # to compare with what is expected of this pass
    try:
        faults.fire("step", 0)
        moments = torch.empty(run.engine.missing_moment_bytes(paged=False), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None
    return moments if all(run_pass(run.engine, run.objective, batch) for _ in range(2)) else None


def out_of_memory(run: Run, micro_batches: Sequence[Any], when: str) -> OutOfMemory:
    """The error for a user: rank, tokens, and the levers with what they give."""
    device = run.engine.device
    lengths = max((batch.document_lengths for batch in micro_batches), key=sum)
    tokens = sum(lengths)
    used = free = None
    if device.type == "cuda":
        used = (torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)) / GIB
        free, total = (value / GIB for value in torch.cuda.mem_get_info(device))
    longest = run.config.data.sequence_limit
    smaller = int(tokens * _SMALLER)
    saving_of = "" if used is None else f" (about {used * (1 - _SMALLER):.1f} GiB less)"
    if smaller >= longest:
        levers = [f"--micro_batch_tokens {smaller}{saving_of}; it does not change the result"]
    else:
        levers = [f"--max_seq_length {max(2, int(longest * _SMALLER))}{saving_of}"]
    if run.config.optimization.recompute != "auto":
        levers.insert(0, "--recompute auto --micro_batch_tokens 0 (measures what fits, and what of it is fastest)")
    elif run.plan.recompute != "all":
        levers.insert(0, "--recompute all (activations of one layer instead of all of them)")
    if run.plan.recompute == "all" and device.type == "cuda":
        levers.append("--recompute all/N (the inputs of N layers wait in host memory: for the longest sequences)")
    levers.append("more GPUs shrink optimizer state and gradients, not activations; --lora_r shrinks both")
    memory = "" if used is None else f"; {used:.1f} GiB of activations, {free:.1f} of {total:.1f} GiB free"
    if refusal := host_memory_refusal(run.engine.network):
        memory = f"; {refusal}"
        levers.insert(0, "fewer layers behind the / of --recompute, or a larger share of the host (Slurm: --mem)")
    return OutOfMemory(
        f"rank {run.engine.ranks.rank} ran out of memory {when}",
        where=f"a micro-batch of {tokens} tokens in {len(lengths)} sequences, the longest {max(lengths)}",
        got=f"--micro_batch_tokens {run.plan.micro_batch_tokens} --recompute {run.plan.recompute}{memory}",
        fix="; or ".join(levers),
    )


def _peak(run: Run, tokens: int) -> str:
    device = run.engine.device
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    expected = "" if run.plan.peak is None else f" ({run.plan.peak(tokens) / GIB:.1f} expected)"
    return f", peak {torch.cuda.max_memory_allocated(device) / GIB:.1f}{expected} of {total / GIB:.1f} GiB"
