"""What a run leaves behind: final adapter, summary.json, and the summary on the terminal."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from anima import distributed
from anima.config.schema import Config
from anima.tracking.sample import Sample
from anima.tracking.summary import RunSummary, format_summary, write_summary
from anima.train import checkpoint, run_folder
from anima.train.meter import History
from anima.train.run import Plan, Run
from anima.train.trainer import memory_peak_gib

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that compute."""
    return {name: version(name) for name in LIBRARIES}


def write_results(run: Run, history: History, *, device: str, compute_dtype: str) -> None:
    """Write and print the results on the main rank; a collective.

    Args:
        run: What ran.
        history: What the loop saw.
        device: Name of the device.
        compute_dtype: bf16, fp32, fp8 or fp8_backward.
    """
    peaks = distributed.gather_objects(memory_peak_gib(run.engine.device))
    state = distributed.gather_objects(run.engine.optimizer_state_bytes())
    run.progress.message(f"optimizer state per rank: {', '.join(f'{size / 2**30:.2f} GiB' for size in state)}")
    run.progress.close()
    if not run.engine.ranks.is_main:
        return
    output_dir = Path(run.config.output.output_dir)
    adapter = output_dir / run_folder.ADAPTER
    checkpoint.write_result(adapter, run.adapter_writer())
    summary = summarize(
        run.config,
        run.plan,
        history,
        num_steps=run.num_steps,
        peak_memory_gib=peaks,
        device=device,
        compute_dtype=compute_dtype,
        files=sorted(p.name + "/" * p.is_dir() for p in output_dir.iterdir() if not p.name.startswith(".")),
        reference=run.reference,
        next_commands=[
            f"python launch/chat.py --adapter {adapter}",
            f"python launch/merge.py --adapter {adapter} --output_dir {output_dir / 'merged'}",
        ],
    )
    write_summary(output_dir / run_folder.SUMMARY, summary)
    run.tracker.summary(summary.to_json())
    if run.config.output.wandb_log_adapter:
        run.tracker.log_adapter(adapter)
    print(format_summary(summary))


def summarize(
    config: Config,
    plan: Plan,
    history: History,
    *,
    num_steps: int,
    peak_memory_gib: Sequence[float],
    device: str,
    compute_dtype: str,
    files: Sequence[str],
    next_commands: Sequence[str],
    reference: str = "",
) -> RunSummary:
    """The run in one record.

    Args:
        config: What was asked for.
        plan: Micro-batches and recomputation that ran.
        history: What the loop saw.
        num_steps: Optimizer steps done.
        peak_memory_gib: Highest memory of each rank.
        device, compute_dtype: Its name; bf16, fp32, fp8 or fp8_backward.
        files: What was written, relative to the output folder.
        next_commands: What to type next.
        reference: Identity of the model that the policy was compared with; empty for none.
    """
    best_step, best_loss = min(history.eval_losses, key=lambda pair: pair[1], default=(None, None))
    return RunSummary(
        objective=config.objective,
        model=config.model.model_name_or_path,
        steps=num_steps,
        num_sequences=history.sequences,
        num_tokens=history.tokens,
        supervised_tokens=history.supervised_tokens,
        seconds=history.training_seconds,
        tokens_per_second=history.tokens / max(history.training_seconds, 1e-9),
        peak_memory_gib=tuple(peak_memory_gib),
        world_size=len(peak_memory_gib),
        device=device,
        compute_dtype=compute_dtype,
        quantization=config.model.quantization,
        micro_batch_tokens=plan.micro_batch_tokens,
        recompute=plan.recompute,
        train_loss_first=history.losses[0] if history.losses else None,
        train_loss_last=history.losses[-1] if history.losses else None,
        eval_loss_before=history.eval_losses[0][1] if history.eval_losses else None,
        eval_loss_after=history.eval_losses[-1][1] if history.eval_losses else None,
        eval_loss_best=best_loss,
        best_step=best_step,
        eval_metrics_before=history.eval_metrics[0] if history.eval_metrics else {},
        eval_metrics_after=history.eval_metrics[-1] if history.eval_metrics else {},
        reference=reference,
        samples_before=_samples(history, 0),
        samples_after=_samples(history, -1),
        adapter_dir=f"{config.output.output_dir}/adapter",
        output_dir=config.output.output_dir,
        files=tuple(files),
        next_commands=tuple(next_commands),
        versions=library_versions(),
    )


def _samples(history: History, index: int) -> tuple[Sample, ...]:
    """The answers of the trained model; those of a reference never change."""
    return tuple(s for s in history.samples[index][1] if s.label != "reference") if history.samples else ()
