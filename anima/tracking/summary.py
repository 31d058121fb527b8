"""The end of a run: its numbers as a dataclass, as summary.json and as a table for people.

Pure functions of `RunSummary`, apart from `write_summary`. Does not know where the numbers come from.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from anima.disk import replace_file
from anima.tracking.metrics_file import json_safe
from anima.tracking.progress import format_duration
from anima.tracking.sample import Sample
from anima.tracking.terminal import pad, printable, wrap

_LABEL_COLUMNS = 15
_UNITS = {"dpo": "pairs"}
_SHOWN_METRICS = {"rewards/accuracies": "accuracy", "rewards/margins": "reward margin"}
_MOST_RANKS_LISTED = 4


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run did, used and left behind."""

    objective: str
    """sft or dpo."""
    model: str
    """Folder or hub name of the base."""
    steps: int
    """Optimizer steps."""
    num_sequences: int
    """Sequences (pairs for dpo) trained on, over all ranks; one seen twice counts twice."""
    num_tokens: int
    """Tokens trained on, over all ranks; both sides of a pair whole, though their prompt is computed once."""
    supervised_tokens: int
    """Those of them that carried the loss."""
    seconds: float
    """Wall-clock time of the steps, without evaluation and saving."""
    tokens_per_second: float
    """num_tokens / seconds."""
    peak_memory_gib: tuple[float, ...]
    """Highest memory of each rank, GiB: of the GPU, or of the process on a CPU."""
    world_size: int
    """Ranks."""
    device: str
    """What it ran on: cpu, or the GPU's name."""
    compute_dtype: str
    """bf16 or fp32."""
    quantization: str
    """nf4 or none."""
    micro_batch_tokens: int
    """Tokens of a micro-batch, at most: as asked for, or as --recompute auto chose."""
    recompute: str
    """What was recomputed in the backward pass: all, cheap, none, or a number of layers."""
    train_loss_first: float | None
    """Loss of the first logged step."""
    train_loss_last: float | None
    """Loss of the last logged step."""
    eval_loss_before: float | None = None
    """Held-out loss before the first step; None without held-out data."""
    eval_loss_after: float | None = None
    """Held-out loss after the last step."""
    eval_loss_best: float | None = None
    """Lowest held-out loss."""
    best_step: int | None = None
    """Step of the lowest held-out loss."""
    eval_metrics_before: Mapping[str, float] = field(default_factory=dict)
    """All held-out metrics before the first step."""
    eval_metrics_after: Mapping[str, float] = field(default_factory=dict)
    """All held-out metrics after the last step."""
    reference: str = ""
    """Identity of the model that a preference run was compared with."""
    samples_before: tuple[Sample, ...] = ()
    """Answers before the first step."""
    samples_after: tuple[Sample, ...] = ()
    """Answers after the last step."""
    adapter_dir: str
    """Folder of the adapter."""
    output_dir: str
    """Folder of the run."""
    files: tuple[str, ...] = ()
    """What was written, relative to output_dir."""
    next_commands: tuple[str, ...] = ()
    """Commands to type next."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Version of each library that matters."""

    def to_json(self) -> dict[str, object]:
        """All fields, ready for strict JSON: samples as objects, numbers that are not finite as "nan" or "inf"."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("samples_before", "samples_after"):
            values[name] = [vars(sample) for sample in values[name]]
        return json_safe(values)


def write_summary(path: Path, summary: RunSummary) -> None:
    """Write `summary` as JSON; the file is there whole or not at all.

    Raises:
        OSError: The disk refuses; an older file at `path` is untouched.
    """
    text = json.dumps(summary.to_json(), ensure_ascii=False, allow_nan=False, indent=2)
    replace_file(path, f"{text}\n".encode(errors="backslashreplace"))


def format_summary(summary: RunSummary, columns: int = 90) -> str:
    """The summary as text of at most `columns`, commands and paths excepted: those must survive copying.

    Args:
        summary: The run.
        columns: Width; a Chinese character takes two.
    """
    rule = "=" * columns
    lines = [rule, *wrap(f"{summary.objective} of {summary.model}: {summary.steps:,} steps done", columns), rule]
    for label, value in _rows(summary):
        head, *rest = wrap(value, columns - _LABEL_COLUMNS)
        lines += [pad(label, _LABEL_COLUMNS) + head, *(" " * _LABEL_COLUMNS + line for line in rest)]
    lines += _samples(summary, columns)
    lines += ["", pad("adapter", _LABEL_COLUMNS) + summary.adapter_dir]
    lines += [pad("run", _LABEL_COLUMNS) + summary.output_dir]
    for line in wrap(", ".join(summary.files), columns - _LABEL_COLUMNS) if summary.files else ():
        lines.append(" " * _LABEL_COLUMNS + line)
    if summary.next_commands:
        lines += ["", "Next:", *(f"  {command}" for command in summary.next_commands)]
    return "\n".join([*lines, rule])


def _rows(summary: RunSummary) -> list[tuple[str, str]]:
    base = "NF4 base" if summary.quantization == "nf4" else "16-bit base"
    rows = [
        ("data", f"{summary.num_sequences:,} {_UNITS.get(summary.objective, 'sequences')}, {_tokens(summary)}"),
        ("speed", f"{summary.tokens_per_second:,.0f} tokens/s, {format_duration(summary.seconds)} of training"),
        ("ran on", f"{_ranks(summary.world_size)} on {summary.device}, {base}, {summary.compute_dtype} compute"),
        (
            "micro-batches",
            f"{summary.micro_batch_tokens:,} tokens at most, recomputed: {_recomputed(summary.recompute)}",
        ),
        ("peak memory", _memory(summary.peak_memory_gib)),
        ("train loss", f"{_loss(summary.train_loss_first)} -> {_loss(summary.train_loss_last)} (first -> last step)"),
    ]
    if summary.eval_loss_before is not None or summary.eval_loss_after is not None:
        before, after = _loss(summary.eval_loss_before), _loss(summary.eval_loss_after)
        known = summary.best_step is not None
        best = f", best {_loss(summary.eval_loss_best)} at step {summary.best_step}" if known else ""
        rows.append(("held-out loss", f"{before} -> {after} (before -> after){best}"))
    for name, label in _SHOWN_METRICS.items():
        if name in summary.eval_metrics_before and name in summary.eval_metrics_after:
            before, after = _loss(summary.eval_metrics_before[name]), _loss(summary.eval_metrics_after[name])
            rows.append((label, f"{before} -> {after} (held-out, before -> after)"))
    if summary.reference:
        rows.append(("reference", summary.reference))
    if summary.versions:
        rows.append(("versions", " ".join(f"{name}=={version}" for name, version in summary.versions.items())))
    return rows


def _recomputed(policy: str) -> str:
    return f"{policy} layers" if policy.isdecimal() else policy


def _tokens(summary: RunSummary) -> str:
    share = f" ({summary.supervised_tokens / summary.num_tokens:.0%})" if summary.num_tokens else ""
    return f"{summary.num_tokens:,} tokens, {summary.supervised_tokens:,} of them supervised{share}"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _memory(peaks: tuple[float, ...]) -> str:
    if len(peaks) <= _MOST_RANKS_LISTED:
        return ", ".join(f"rank {rank}: {peak:.2f} GiB" for rank, peak in enumerate(peaks)) or "not measured"
    highest = max(range(len(peaks)), key=peaks.__getitem__)
    return f"{min(peaks):.2f} to {peaks[highest]:.2f} GiB over {len(peaks)} ranks (most on rank {highest})"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _samples(summary: RunSummary, columns: int) -> list[str]:
    """Each question with its answers before and after, one below the other: Chinese needs the whole width."""
    before = {sample.prompt: sample.answer for sample in summary.samples_before}
    after = {sample.prompt: sample.answer for sample in summary.samples_after}
    lines: list[str] = []
    for prompt in dict.fromkeys([*before, *after]):
        lines.append("")
        lines += _labelled("question", prompt, columns)
        if prompt in before:
            lines += _labelled("  before", before[prompt], columns)
        if prompt in after:
            lines += _labelled("  after", after[prompt], columns)
    return lines


def _labelled(label: str, text: str, columns: int) -> list[str]:
    head, *rest = wrap(printable(text) or "(empty)", columns - _LABEL_COLUMNS)
    return [pad(label, _LABEL_COLUMNS) + head, *(" " * _LABEL_COLUMNS + line for line in rest)]
