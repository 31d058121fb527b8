"""The loop: step, log, evaluate, save. No callbacks: who wants something else edits forty lines."""

import math
import resource
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from anima import distributed
from anima.errors import CheckpointError, RunStopped
from anima.tracking.tracker import Sample
from anima.train import faults, run_folder, saving, stop
from anima.train.engine import StepOutcome
from anima.train.evaluate import evaluate
from anima.train.health import write_report
from anima.train.meter import History, Meter
from anima.train.rehearsal import out_of_memory, rehearse
from anima.train.resume import restore, seed_rank
from anima.train.run import Run
from anima.train.schedule import learning_rate_at
from anima.train.step import train_step

RESERVE = 2.0
"""Before a time limit: times the slowest step and the slowest save are kept free."""


def train(run: Run) -> tuple[Run, History]:
    """Run all steps, from the start or from `run.origin`; a collective, called on every rank alike.

    Returns:
        The run, whose micro-batches may have become smaller, and what was seen.

    Raises:
        RunStopped: somebody asked for it; the state is saved.
        TrainingError: a LoRA matrix gets no gradient, memory does not suffice, or gradients are not finite again
            and again.
        CheckpointError: there is no room for checkpoints, or what is resumed is not what was saved.
    """
    meter, saver = Meter(run.engine.device), _saver(run)
    run.watchdog.start()
    try:
        run, history = _start(run, meter)
        run.stop.defer()
        first = 1 + (run.origin.step if run.origin else 0)
        for step in range(first, run.num_steps + 1):
            agreed = _step(run, step, step == first, meter, history, saver)
            _after_step(run, step, meter, history, saver, stop.reasons(agreed))
        saver.wait()
        return run, history
    finally:
        run.watchdog.stop()


def _saver(run: Run) -> saving.Saver:
    output = run.config.output
    root = Path(output.output_dir) / run_folder.CHECKPOINTS
    saver = saving.Saver(root, keep=output.save_total_limit, say=run.progress.message)
    saver.last_good = run.origin.folder if run.origin else None
    return saver


def _start(run: Run, meter: Meter) -> tuple[Run, History]:
    """Everything before the first step of this process."""
    _check_disk(run)
    run.engine.train_mode()
    if run.origin is None:
        seed_rank(run.config.seed, 0, run.engine.ranks.rank)
        history = History()
        _check_start(run)
        _evaluate(run, 0, history)
    else:
        history = restore(run, run.origin, meter)
    run.watchdog.beat("the heaviest micro-batch")
    if run.origin is None or run.origin.step < run.num_steps:
        run = rehearse(run)
    run.progress.begin()
    meter.go_on()
    return run, history


def _step(run: Run, step: int, is_first: bool, meter: Meter, history: History, saver: saving.Saver) -> list[float]:
    """One optimizer step and what it tells; returns what asked for a stop on any rank."""
    run.watchdog.beat(f"step {step}")
    faults.fire("step", step)
    began = time.perf_counter()
    micro_batches = run.steps.step(step - 1, num_train_epochs=run.num_train_epochs)
    learning_rate = _learning_rate(run, step)
    try:
        outcome = train_step(
            run.engine, run.objective, micro_batches, learning_rate, meter.sums, flags=run.stop.flags()
        )
    except torch.OutOfMemoryError as error:
        raise out_of_memory(run, micro_batches, f"in step {step}") from error
    meter.count(micro_batches, run.objective)
    if is_first:
        run.probe.check()
    history.health.step_done(outcome.grad_norm, skipped=outcome.skipped)
    if outcome.skipped:
        _not_finite(run, step, meter, history, saver)
    saver.report()
    if step % run.config.output.logging_steps == 0 or step == run.num_steps:
        _log(run, step, learning_rate, outcome, meter, history)
    seconds = time.perf_counter() - began
    run.stop.reserve_seconds = max(run.stop.reserve_seconds, RESERVE * (seconds + saver.seconds))
    return list(outcome.agreed)


def _after_step(run: Run, step: int, meter: Meter, history: History, saver: saving.Saver, stopping: list[str]) -> None:
    """Evaluate, save and stop, in this order: a checkpoint knows all that was logged up to its step."""
    output, is_last = run.config.output, step == run.num_steps
    meter.pause()
    if is_last or (output.eval_steps and step % output.eval_steps == 0):
        _evaluate(run, step, history)
    saved = bool(output.save_steps) and step % output.save_steps == 0
    if saved or (stopping and not is_last):
        _save(run, step, meter, history, saver)
    if stopping and not is_last:
        run.watchdog.beat("the last checkpoint")
        saver.wait()
        _stop(run, step, saver, stopping)
    meter.go_on()


def _stop(run: Run, step: int, saver: saving.Saver, stopping: list[str]) -> None:
    where = distributed.from_main(saver.last_good)
    saved = where is not None and where.name == f"step-{step}"
    raise RunStopped(
        f"{' and '.join(stopping)} after step {step} of {run.num_steps}",
        got=f"saved {where}" if saved else f"the last checkpoint could not be written; there is {where or 'none'}",
        fix="the same command with --resume auto goes on",
    )


def _learning_rate(run: Run, step: int) -> float:
    settings = run.config.optimization
    return learning_rate_at(
        step,
        peak=settings.learning_rate,
        num_steps=run.num_steps,
        warmup_ratio=settings.warmup_ratio,
        kind=settings.lr_scheduler_type,
    )


def _not_finite(run: Run, step: int, meter: Meter, history: History, saver: saving.Saver) -> None:
    """A step was skipped on every rank: leave a trace of what went into it, and stop if it is one of many."""
    loss = meter.sums.export().get("loss")
    local = 0.0 if loss is None else float(loss[0])
    by_rank = distributed.gather_objects(local)
    rows = run.steps.sources(step - 1, num_train_epochs=run.num_train_epochs)
    report = Path(run.config.output.output_dir) / run_folder.NOT_FINITE / f"step-{step}.json"
    run.progress.message(f"step {step}: a gradient is not finite; the step is skipped on every rank. Rows: {report}")
    if run.engine.ranks.is_main:
        try:
            write_report(report, step, rows, by_rank, history.health)
        except OSError as error:
            run.progress.message(f"{report}: {error}; rows {', '.join(rows[:8])} …")
    history.health.check_skips(step, report, distributed.from_main(saver.last_good))


def _log(run: Run, step: int, learning_rate: float, outcome: StepOutcome, meter: Meter, history: History) -> None:
    means, (tokens, scored, sequences), seconds, steps = meter.read()
    history.tokens += tokens
    history.supervised_tokens += scored
    history.sequences += sequences
    history.training_seconds += seconds
    history.losses.append(means.get("loss", float("nan")))
    peak = memory_peak_gib(run.engine.device)
    run.tracker.log(
        step,
        {f"train/{name}": value for name, value in means.items()}
        | {
            "train/grad_norm": outcome.grad_norm,
            "train/learning_rate": learning_rate,
            "train/epoch": run.steps.epoch(step),
            "train/skipped_steps": float(history.health.skipped),
            "perf/tokens_per_second": tokens / seconds,
            "perf/step_seconds": seconds / steps,
            "memory/peak_gib": peak,
        },
    )
    if warning := history.health.leap(history.losses[-1]):
        rows = run.steps.sources(step - 1, num_train_epochs=run.num_train_epochs)
        run.progress.message(f"step {step}: WARNING: {warning}. Rows of this step: {', '.join(rows[:8])} …")
    run.progress.update(step, loss=history.losses[-1], tokens_per_second=tokens / seconds, memory_gib=peak)


def _evaluate(run: Run, step: int, history: History) -> None:
    """Held-out metrics and sample answers into the tracker; nothing where neither was asked for."""
    if run.held_out is not None:
        means = evaluate(run.engine, run.objective, _watched(run, run.held_out, step))
        history.eval_losses.append((step, means["loss"]))
        history.eval_metrics.append(means)
        run.tracker.log(step, {f"eval/{name}": value for name, value in means.items()})
        for line in (f"step {step}: held-out loss {means['loss']:.4f}", *run.watch(step, means)):
            run.progress.message(line)
    if run.benchmarks is not None:
        run.engine.eval_mode()
        scores = run.benchmarks(lambda doing: run.watchdog.beat(f"{doing} at step {step}"))
        run.engine.train_mode()
        run.tracker.log(step, {f"benchmark/{name}": value for name, value in scores.items()})
        told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name.endswith("/accuracy"))
        run.progress.message(f"step {step}: {told}")
    prompts = run.config.output.sample_prompts
    if prompts:
        run.watchdog.beat(f"sample answers at step {step}")
        answers = run.answer(prompts) if run.engine.ranks.is_main else []
        samples = _samples(prompts, answers, "policy" if run.reference_answers else "")
        samples += _samples(prompts, run.reference_answers, "reference")
        history.samples.append((step, samples))
        run.tracker.log_samples(step, samples)
        distributed.wait_for_all()
        run.engine.train_mode()


def _check_start(run: Run) -> None:
    """What can be known about the untrained policy is measured and logged; or training does not start."""
    measured = run.check_start(run.engine, run.steps.step(0, num_train_epochs=run.num_train_epochs))
    if measured:
        run.tracker.log(0, measured)
        run.progress.message(", ".join(f"{name} {value:.6g}" for name, value in measured.items()))


def _samples(prompts: Sequence[str], answers: Sequence[str], label: str) -> list[Sample]:
    return [Sample(prompt, answer, label) for prompt, answer in zip(prompts, answers, strict=False)]


def _watched(run: Run, micro_batches: Iterable[Any], step: int) -> Iterator[Any]:
    """Every micro-batch of an evaluation counts as life."""
    for batch in micro_batches:
        run.watchdog.beat(f"the evaluation at step {step}")
        yield batch


def _save(run: Run, step: int, meter: Meter, history: History, saver: saving.Saver) -> None:
    """Copy the state and let it be written beside the training; weights that are not finite are never saved."""
    run.watchdog.beat(f"the checkpoint of step {step}")
    began = time.perf_counter()
    write = saving.snapshot(run, step, history, meter)
    if write is None:
        run.progress.message(f"step {step}: NOT SAVED: the adapter gives a loss that is not finite")
    elif run.engine.ranks.is_main:
        measured, score = history.eval_losses[-1] if history.eval_losses else (-1, math.nan)
        saver.start(step, write, score if measured == step and math.isfinite(score) else None, began)


def _check_disk(run: Run) -> None:
    """Room for one checkpoint or the adapter is needed, for all that are kept wished for; the same on every rank."""
    output = run.config.output
    free = distributed.from_main(shutil.disk_usage(_existing(Path(output.output_dir))).free)
    once = run.engine.checkpoint_bytes()
    kept = once * (output.save_total_limit + 2)  # beside the newest: the best, and the one being written
    gib = 2**30
    if free < once:
        raise CheckpointError(
            "there is no room for the result",
            where=f"--output_dir {output.output_dir}",
            got=f"{free / gib:.2f} GiB free",
            allowed=f"{once / gib:.2f} GiB for one checkpoint, {kept / gib:.2f} GiB for all that are kept",
            fix="free some space, or choose a folder on another disk",
        )
    if output.save_steps:
        warning = "" if free >= kept else f"; WARNING: only {free / gib:.2f} GiB are free, fewer will fit"
        run.progress.message(
            f"a checkpoint takes about {once / gib:.2f} GiB, up to {kept / gib:.2f} GiB in all{warning}"
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def memory_peak_gib(device: torch.device) -> float:
    """Highest memory of this process so far, GiB: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
