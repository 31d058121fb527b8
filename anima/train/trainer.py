"""The loop: step, log, evaluate, save. No callbacks: who wants something else edits forty lines."""

import json
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from anima import distributed
from anima.config.schema import Config
from anima.errors import TrainingError
from anima.objectives.objective import Objective
from anima.tracking.progress import Progress
from anima.tracking.tracker import Sample, Tracker
from anima.train import checkpoint
from anima.train.engine import Engine, StepOutcome
from anima.train.evaluate import evaluate
from anima.train.method import StartCheck, Watch, nothing_to_check, nothing_to_say
from anima.train.metrics import MetricSums
from anima.train.schedule import learning_rate_at
from anima.train.step import GradientProbe, train_step

MAX_SKIPPED_IN_A_ROW = 5
"""Steps with gradients that are not finite before the run stops."""


class Steps(Protocol):
    """The training set as steps: `data/loader.py`."""

    def step(self, index: int, *, num_train_epochs: float | None = None) -> Sequence[Any]:
        """This rank's micro-batches of optimizer step `index` (0-based)."""
        ...

    def sources(self, index: int, *, num_train_epochs: float | None = None) -> list[str]:
        """Where the step's rows came from."""
        ...

    def epoch(self, index: int) -> float:
        """Epochs seen before step `index`."""
        ...


@dataclass(frozen=True)
class Run:
    """Everything the loop drives; built by launch/train.py."""

    config: Config
    num_steps: int
    engine: Engine
    objective: Objective[Any]
    steps: Steps
    num_train_epochs: float | None
    held_out: Iterable[Any] | None
    probe: GradientProbe
    tracker: Tracker
    progress: Progress
    answer: Callable[[Sequence[str]], list[str]]
    write_adapter: Callable[[Path], None]
    reference: str = ""
    reference_answers: Sequence[str] = ()
    check_start: StartCheck = nothing_to_check
    watch: Watch = nothing_to_say


@dataclass
class History:
    """What the loop has seen so far; becomes the run's summary."""

    tokens: int = 0
    supervised_tokens: int = 0
    sequences: int = 0
    training_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    eval_metrics: list[dict[str, float]] = field(default_factory=list)
    samples: list[tuple[int, list[Sample]]] = field(default_factory=list)
    skipped_in_a_row: int = 0
    skipped: int = 0


def train(run: Run) -> History:
    """Run all steps; a collective, called on every rank alike.

    Raises:
        TrainingError: a LoRA matrix gets no gradient, or gradients are not finite again and again.
    """
    output, history = run.config.output, History()
    _check_start(run)
    _evaluate(run, 0, history)
    run.engine.train_mode()
    meter = Meter(run.engine.device)
    for step in range(1, run.num_steps + 1):
        micro_batches = run.steps.step(step - 1, num_train_epochs=run.num_train_epochs)
        learning_rate = _learning_rate(run, step)
        outcome = train_step(run.engine, run.objective, micro_batches, learning_rate, meter.sums)
        meter.count(micro_batches, run.objective)
        if step == 1:
            run.probe.check()
        _watch(run, step, outcome, history)
        if step % output.logging_steps == 0 or step == run.num_steps:
            _log(run, step, learning_rate, outcome, meter, history)
        if output.eval_steps and step % output.eval_steps == 0 and step < run.num_steps:
            _evaluate(run, step, history)
            meter.restart_clock()
        if output.save_steps and step % output.save_steps == 0:
            _save(run, step, history)
            meter.restart_clock()
    _evaluate(run, run.num_steps, history)
    return history


class Meter:
    """Loss, tokens and time since the last line of metrics."""

    def __init__(self, device: torch.device) -> None:
        """Start the clock."""
        self.sums = MetricSums()
        self._device = device
        self._counts = [0, 0, 0]
        self._seconds = 0.0
        self._steps = 0
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Leave out time that was not training (evaluation, saving)."""
        self._started = time.perf_counter()

    def count(self, micro_batches: Sequence[Any], objective: Objective[Any]) -> None:
        """Count one step of this rank; fillers carry no weight and do not count."""
        real = [batch for batch in micro_batches if objective.weight(batch)]
        self._counts[0] += sum(sum(batch.document_lengths) for batch in real)
        self._counts[1] += sum(batch.num_scored for batch in real)
        self._counts[2] += sum(batch.num_examples for batch in real)
        self._steps += 1

    def read(self) -> tuple[dict[str, float], list[int], float, int]:
        """Means, (tokens, scored tokens, sequences), seconds and steps over all ranks since the last reading."""
        means = self.sums.reduce()
        counts = distributed.sum_over_ranks(torch.tensor(self._counts, device=self._device)).tolist()
        now = time.perf_counter()
        seconds, steps = now - self._started, self._steps
        self._counts, self._steps, self._started = [0, 0, 0], 0, now
        return means, counts, seconds, steps


def _learning_rate(run: Run, step: int) -> float:
    settings = run.config.optimization
    return learning_rate_at(
        step,
        peak=settings.learning_rate,
        num_steps=run.num_steps,
        warmup_ratio=settings.warmup_ratio,
        kind=settings.lr_scheduler_type,
    )


def _check_start(run: Run) -> None:
    """What can be known about the untrained policy is measured and logged; or training does not start."""
    measured = run.check_start(run.engine, run.steps.step(0, num_train_epochs=run.num_train_epochs))
    if measured:
        run.tracker.log(0, measured)
        run.progress.message(", ".join(f"{name} {value:.6g}" for name, value in measured.items()))


def _watch(run: Run, step: int, outcome: StepOutcome, history: History) -> None:
    if not outcome.skipped:
        history.skipped_in_a_row = 0
        return
    history.skipped += 1
    history.skipped_in_a_row += 1
    rows = ", ".join(run.steps.sources(step - 1, num_train_epochs=run.num_train_epochs)[:8])
    run.progress.message(f"step {step}: a gradient is not finite; the step is skipped on every rank. Rows: {rows} …")
    if history.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row",
            where=f"step {step}",
            got=f"rows {rows} …",
            fix="lower --learning_rate, look at these rows, or try --compute_dtype fp32",
        )


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
            "train/skipped_steps": float(history.skipped),
            "perf/tokens_per_second": tokens / seconds,
            "perf/step_seconds": seconds / steps,
            "memory/peak_gib": peak,
        },
    )
    run.progress.update(step, loss=history.losses[-1], tokens_per_second=tokens / seconds, memory_gib=peak)


def _evaluate(run: Run, step: int, history: History) -> None:
    """Held-out metrics and sample answers into the tracker; nothing where neither was asked for."""
    if run.held_out is not None:
        means = evaluate(run.engine, run.objective, run.held_out)
        history.eval_losses.append((step, means["loss"]))
        history.eval_metrics.append(means)
        run.tracker.log(step, {f"eval/{name}": value for name, value in means.items()})
        for line in (f"step {step}: held-out loss {means['loss']:.4f}", *run.watch(step, means)):
            run.progress.message(line)
    prompts = run.config.output.sample_prompts
    if prompts:
        answers = run.answer(prompts) if run.engine.ranks.is_main else []
        samples = _samples(prompts, answers, "policy" if run.reference_answers else "")
        samples += _samples(prompts, run.reference_answers, "reference")
        history.samples.append((step, samples))
        run.tracker.log_samples(step, samples)
        distributed.wait_for_all()
        run.engine.train_mode()


def _samples(prompts: Sequence[str], answers: Sequence[str], label: str) -> list[Sample]:
    return [Sample(prompt, answer, label) for prompt, answer in zip(prompts, answers, strict=False)]


def _save(run: Run, step: int, history: History) -> None:
    state = {"step": step, "num_steps": run.num_steps, "tokens": history.tokens, "eval_losses": history.eval_losses}
    if run.engine.ranks.is_main:
        folder = checkpoint.commit(
            Path(run.config.output.output_dir) / "checkpoints",
            step,
            lambda staging: _write_checkpoint(run, staging, state),
            keep=run.config.output.save_total_limit,
        )
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        run.progress.message(f"step {step}: saved {folder} ({size / 2**20:.1f} MiB)")
    distributed.wait_for_all()


def _write_checkpoint(run: Run, folder: Path, state: dict[str, Any]) -> None:
    run.write_adapter(folder)
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def memory_peak_gib(device: torch.device) -> float:
    """Highest memory of this process so far, GiB: device memory on a GPU, resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
