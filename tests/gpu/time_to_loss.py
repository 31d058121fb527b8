"""Seconds and tokens to a held-out loss, ours (bf16, fp8) against TRL: speed is never bought with a worse step.

    python tests/gpu/time_to_loss.py --model .models/smollm2-135m-instruct --files ROWS… --output_dir /tmp/ttl \\
        --json time_to_loss.json

All runs begin with the same adapter over the same NF4 base and take the same optimizer steps: our tokens and loss
masks, the same rows in every step, learning rate, clipping, optimizer class. Adapters saved at fixed steps are
measured by one code (held_out.py) afterwards. The clock counts training steps alone; the first ones, in which kernels
are compiled, are charged at the mean of the others. `trl_grouped` may mix other rows into a step, by length.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from held_out import REPOSITORY, metrics_of, split_files

WARM_UP_STEPS = 3
KINDS = ("bf16", "fp8", "trl", "trl_grouped")
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "deepspeed")


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
    held_out: list[float]


def main() -> None:
    """Prepare, train one run behind the other, measure, compare; or be the process that prepares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with real weights, 16 bit or NF4")
    parser.add_argument("--files", nargs="+", type=Path, required=True, help="conversations")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--json", type=Path, required=True, help="all curves; written after every run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["bf16", "fp8", "trl"])
    parser.add_argument("--target", type=float, help="held-out loss to reach; default: 1.02 x the worst final one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--measure_every", type=int, default=20, help="steps")
    parser.add_argument("--held_out_share", type=float, default=0.1, help="of every file")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--global_batch_size", type=int, default=16)
    parser.add_argument("--trl_micro_batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lr_scheduler_type", choices=("constant", "linear", "cosine"), default="cosine")
    parser.add_argument("--warmup_ratio", type=float, default=0.03)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: does this script run?")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS or options.steps % options.measure_every:
        parser.error(f"--steps must be a multiple of --measure_every, and more than {WARM_UP_STEPS}")
    options.output_dir = options.output_dir.resolve()
    options.model = str(Path(options.model).resolve())
    options.rows = split_files(options.files, options.output_dir / "rows", options.held_out_share)
    if options.inside:
        prepare_all(options)
        return
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inside"], check=True, cwd=REPOSITORY)
    curves = []
    for kind in options.kinds:
        print(f"== {kind}", flush=True)
        curves.append(run_trl(options, kind) if kind.startswith("trl") else run_ours(options, kind))
        save(options, curves, {})
    measure(options, curves)
    save(options, curves, report(options, curves))


def save(options: argparse.Namespace, curves: list[Curve], found: dict[str, Any]) -> None:
    """Everything as JSON."""
    settings = {name: str(value) for name, value in vars(options).items()}
    versions = {name: installed(name) for name in VERSIONS}
    values = {"settings": settings, "versions": versions, **found, "curves": [asdict(curve) for curve in curves]}
    options.json.write_text(json.dumps(values), "utf-8")


def installed(name: str) -> str:
    """Version of a library, or nothing."""
    try:
        return version(name)
    except ModuleNotFoundError:
        return ""


def prepare_all(options: argparse.Namespace) -> None:
    """The adapter that all begin with, and the rows of every step, in order, in tokens, for TRL."""
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    from anima.config.schema import DataConfig, LoraConfig, ModelConfig
    from anima.data.loader import StepLoader
    from anima.data.prepare import prepare
    from anima.model.base_model import load_base
    from anima.model.compute import choose_compute
    from anima.model.lora import attach_lora, save_adapter
    from anima.model.tokenizer import load_tokenizer

    train, held_out = options.rows
    compute = choose_compute(options.device, "bf16" if options.device == "cuda" else "fp32", 0)
    model = ModelConfig(model_name_or_path=options.model)
    data = DataConfig(
        train_files=tuple(train),
        eval_files=tuple(held_out),
        max_seq_length=options.max_seq_length,
        data_cache_dir=str(options.output_dir / "data"),
    )
    rows = prepare(data, load_tokenizer(model), seed=options.seed).train
    batch: dict[str, Any] = {"global_batch_size": options.global_batch_size, "micro_batch_tokens": 8192}
    loader = StepLoader(rows, packing=True, seed=options.seed, rank=0, world_size=1, **batch)
    with (options.output_dir / "steps.jsonl").open("w") as file:
        for step in range(options.steps):
            for row in (rows[int(number)] for number in loader.rows(step)):
                ids, labels = row.input_ids.tolist(), row.labels.tolist()
                file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")
    lora = LoraConfig(lora_r=options.lora_r, lora_alpha=2 * options.lora_r)
    adapted = attach_lora(load_base(model, compute), lora, dtype=compute.dtype, seed=options.seed)
    save_adapter(adapted, options.output_dir / "start")


def run_ours(options: argparse.Namespace, kind: str) -> Curve:
    """launch/train.py from the prepared adapter, with a checkpoint at every measured step."""
    folder = options.output_dir / kind
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        *(sys.executable, str(REPOSITORY / "launch" / "train.py"), "--model_name_or_path", options.model),
        *("--adapter_path", str(options.output_dir / "start"), "--compute_dtype", kind, "--seed", str(options.seed)),
        *("--train_files", *options.rows[0], "--eval_files", *options.rows[1], "--recompute", "none"),
        *("--max_seq_length", str(options.max_seq_length), "--data_cache_dir", str(options.output_dir / "data")),
        *("--global_batch_size", str(options.global_batch_size), "--micro_batch_tokens", "8192"),
        *("--lora_r", str(options.lora_r), "--lora_alpha", str(2 * options.lora_r), "--max_grad_norm", "1.0"),
        *("--learning_rate", str(options.learning_rate), "--lr_scheduler_type", options.lr_scheduler_type),
        *("--warmup_ratio", str(options.warmup_ratio), "--max_steps", str(options.steps), "--sample_prompts"),
        *("--save_steps", str(options.measure_every), "--tracker", "jsonl"),
        *("--save_total_limit", str(len(measured_steps(options)))),
        *("--output_dir", str(folder), "--device", options.device),
    ]
    run(command, options.output_dir / f"{kind}.log")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/step_seconds" in line]
    seconds = [line["perf/step_seconds"] for line in lines]
    tokens = [round(line["perf/tokens_per_second"] * line["perf/step_seconds"]) for line in lines]
    clock = [sum(seconds[WARM_UP_STEPS:step]) for step in range(options.steps + 1)]
    names = {step: str(folder / "checkpoints" / f"step-{step}") for step in measured_steps(options)}
    return curve(options, kind, sum(seconds[:WARM_UP_STEPS]), clock, tokens, lines[0]["train/loss"], names)


def run_trl(options: argparse.Namespace, kind: str) -> Curve:
    """time_to_loss_trl.py in a process of its own."""
    folder = options.output_dir / kind
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        *(sys.executable, str(Path(__file__).with_name("time_to_loss_trl.py")), "--model", options.model),
        *("--start", str(options.output_dir / "start"), "--rows", str(options.output_dir / "steps.jsonl")),
        *("--output_dir", str(folder), "--steps", str(options.steps), "--save_at", *map(str, measured_steps(options))),
        *("--global_batch_size", str(options.global_batch_size), "--micro_batch", str(options.trl_micro_batch)),
        *("--learning_rate", str(options.learning_rate), "--lr_scheduler_type", options.lr_scheduler_type),
        *("--warmup_ratio", str(options.warmup_ratio), "--warm_up_steps", str(WARM_UP_STEPS)),
        *("--device", options.device, *(["--grouped"] if kind == "trl_grouped" else [])),
    ]
    run(command, options.output_dir / f"{kind}.log")
    found = json.loads((folder / "report.json").read_text())
    clock = {int(step): value for step, value in found["seconds"].items()}
    names = {step: str(folder / f"step-{step}") for step in measured_steps(options)}
    return curve(options, kind, found["warm_up_seconds"], clock, found["step_tokens"], found["first_loss"], names)


def run(command: list[str], log: Path) -> None:
    """Run, with the output in a file; ends this script with the end of that if it fails."""
    with log.open("w") as file:
        code = subprocess.run(command, cwd=REPOSITORY, stdout=file, stderr=file).returncode
    if code:
        sys.exit(f"{log.read_text(errors='replace')[-4000:]}\n{log.stem} ended with {code}")


def measured_steps(options: argparse.Namespace) -> list[int]:
    """Every so many steps."""
    return list(range(options.measure_every, options.steps + 1, options.measure_every))


def curve(
    options: argparse.Namespace,
    kind: str,
    warm_up_seconds: float,
    clock: Any,
    step_tokens: list[int],
    first_loss: float,
    adapters: dict[int, str],
) -> Curve:
    """Bring a run's clock, seconds since the end of the warm-up by step, into the common form."""
    steps = list(adapters)
    pace = clock[steps[-1]] / (steps[-1] - WARM_UP_STEPS)
    return Curve(
        kind=kind,
        steps=[0, *steps],
        seconds=[0.0, *(min(step, WARM_UP_STEPS) * pace + max(0.0, clock[step]) for step in steps)],
        tokens=[sum(step_tokens[:step]) for step in (0, *steps)],
        adapters=[str(options.output_dir / "start"), *adapters.values()],
        first_loss=first_loss,
        step_tokens=step_tokens,
        step_seconds=pace,
        warm_up_seconds=warm_up_seconds,
        held_out=[],
    )


def measure(options: argparse.Namespace, curves: list[Curve]) -> None:
    """Held-out losses of all adapters of all runs in one process."""
    adapters = [Path(name) for one in curves for name in one.adapters]
    flags = ["--max_seq_length", str(options.max_seq_length), "--device", options.device]
    rows = options.rows[1]
    found = iter(metrics_of(adapters, model=options.model, rows=rows, work_dir=options.output_dir, flags=flags))
    for one in curves:
        one.held_out = [next(found)["loss"] for _ in one.adapters]


def reach(values: list[Any], losses: list[float], target: float) -> float | None:
    """Where the loss first meets the target, on a straight line between measurements; None if it never does."""
    for i in range(1, len(losses)):
        if losses[i] <= target:
            share = (losses[i - 1] - target) / (losses[i - 1] - losses[i]) if losses[i - 1] > target else 0.0
            return float(values[i - 1] + share * (values[i] - values[i - 1]))
    return None


def report(options: argparse.Namespace, curves: list[Curve]) -> dict[str, Any]:
    """Tables, and whether the runs really did the same."""
    target = options.target or 1.02 * max(one.held_out[-1] for one in curves)
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


if __name__ == "__main__":
    main()
