"""The heaviest micro-batch of the run, before the first step: a run that starts does not die of memory at step 4,000.

Also what a user reads when the memory does not suffice. Changes no number of the training that follows.
"""

from collections.abc import Sequence
from typing import Any

import torch

from anima.errors import OutOfMemory
from anima.train import faults, saving
from anima.train.run import Run

GIB = 2**30
_SMALLER = 0.75
"""Share of the tokens that is proposed after running out of memory."""


def rehearse(run: Run) -> None:
    """Forward and backward of the heaviest micro-batch, twice, as if it were a step. A collective.

    Twice, so that the second finds the first one's gradients. The loss is turned into a NaN: then every gradient is,
    and DeepSpeed itself skips the step and drops all it has gathered. The moments that the first real step will
    create are stood in for by an empty tensor of their size.

    Raises:
        OutOfMemory: it does not fit.
    """
    device = run.engine.device
    random = saving.random_state(device)
    batch = run.steps.heaviest(run.num_steps, num_train_epochs=run.num_train_epochs)
    weight = torch.ones((), device=device)
    try:
        faults.fire("step", 0)
        ballast = torch.empty(run.engine.missing_moment_bytes(), dtype=torch.uint8, device=device)
        with run.engine.accumulating():
            for _ in range(2):
                output = run.objective(run.engine, batch.to(device))
                run.engine.backward(output.loss_sum * float("nan"), weight)
        if not run.engine.step(0.0).skipped:
            raise AssertionError("a step of NaN was not skipped")
        del ballast
    except torch.OutOfMemoryError as error:
        raise out_of_memory(run, [batch], "before the first step, at the heaviest micro-batch of the run") from error
    run.probe.forget()
    saving.set_random_state(random, device)
    tokens = sum(batch.document_lengths)
    run.progress.message(f"heaviest micro-batch of the run: {tokens:,} tokens; it fits{_peak(device)}")


def out_of_memory(run: Run, micro_batches: Sequence[Any], when: str) -> OutOfMemory:
    """The error for a user: rank, tokens, and the levers with what they give."""
    batch, device = run.config.batch, run.engine.device
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
    if run.config.optimization.recompute != "all":
        levers.insert(0, "--recompute all (activations of one layer instead of all of them)")
    levers.append("more GPUs shrink optimizer state and gradients, not activations; --lora_r shrinks both")
    memory = "" if used is None else f"; {used:.1f} GiB of activations, {free:.1f} of {total:.1f} GiB free"
    return OutOfMemory(
        f"rank {run.engine.ranks.rank} ran out of memory {when}",
        where=f"a micro-batch of {tokens} tokens in {len(lengths)} sequences, the longest {max(lengths)}",
        got=f"--micro_batch_tokens {batch.micro_batch_tokens}{memory}",
        fix="; or ".join(levers),
    )


def _peak(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    total = torch.cuda.get_device_properties(device).total_memory
    return f", peak {torch.cuda.max_memory_allocated(device) / GIB:.1f} of {total / GIB:.1f} GiB"
