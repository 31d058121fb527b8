"""Seconds and tokens to a held-out loss, ours (bf16, fp8) against TRL: speed is never bought with a worse step.

    python tests/gpu/time_to_loss.py --model .models/smollm2-135m-instruct --files ROWS… --output_dir /tmp/ttl \\
        --json time_to_loss.json

All runs begin with the same adapter over the same NF4 base and take the same optimizer steps: our tokens and loss
masks, the same rows in every step, learning rate, clipping, optimizer class. Adapters saved at fixed steps are
measured by one code (held_out.py) afterwards. The clock counts training steps alone; the first ones, in which kernels
are compiled, are charged at the mean of the others. `trl` is TRL as it comes, in bf16; `trl_fp32` has products and
adapter in fp32; `trl_grouped` may mix other rows into a step, by length. All processes import side by side, then work
one behind the other. What is finished in --output_dir is not run again: a command that was cut off is given again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from held_out import metrics_command, split_files
from time_to_loss_report import WARM_UP_STEPS, Curve, report
from turns import REPOSITORY, Turn

KINDS = ("bf16", "fp8", "fp32", "trl", "trl_fp32", "trl_grouped")
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "deepspeed")


def main() -> None:
    """Prepare, train one run behind the other, measure, compare; or be the process that prepares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with real weights, 16 bit or NF4")
    parser.add_argument("--files", nargs="+", type=Path, required=True, help="conversations")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="of one comparison; other settings need another one"
    )
    parser.add_argument("--json", type=Path, required=True, help="all curves; written after every run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["bf16", "fp8", "trl"])
    parser.add_argument("--target", type=float, help="held-out loss to reach; default: 1.02 x the worst final one")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--measure_every", type=int, default=20, help="steps")
    parser.add_argument("--held_out_share", type=float, default=0.1, help="of every file")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--global_batch_size", type=int, default=16)
    parser.add_argument("--trl_micro_batch", type=int, help="default: a step in one pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--lr_scheduler_type", choices=("constant", "linear", "cosine"), default="cosine")
    parser.add_argument("--warmup_ratio", type=float, default=0.03)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: without timings that count")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS or options.steps % options.measure_every:
        parser.error(f"--steps must be a multiple of --measure_every, and more than {WARM_UP_STEPS}")
    options.trl_micro_batch = options.trl_micro_batch or options.global_batch_size
    if options.global_batch_size % options.trl_micro_batch:
        parser.error("--global_batch_size must be a multiple of --trl_micro_batch")
    options.output_dir = options.output_dir.resolve()
    options.model = str(Path(options.model).resolve())
    check_settings(options)
    options.rows = split_files(options.files, options.output_dir / "rows", options.held_out_share)
    if options.inside:
        prepare_all(options)
        return
    compare(options)


def check_settings(options: argparse.Namespace) -> None:
    """Refuse a folder of other settings."""
    free = ("kinds", "json", "target", "inside")
    settings = json.dumps({name: str(value) for name, value in vars(options).items() if name not in free})
    options.output_dir.mkdir(parents=True, exist_ok=True)
    written = options.output_dir / "settings.json"
    if written.exists() and written.read_text("utf-8") != settings:
        sys.exit(f"{options.output_dir} holds runs of other settings: {written}")
    written.write_text(settings, "utf-8")


def compare(options: argparse.Namespace) -> None:
    """Start what is missing, train one run behind the other, measure."""
    began = time.perf_counter()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    turns = {kind: start_run(options, kind) for kind in options.kinds if not finished(options, kind)}
    measuring = start_measuring(options)
    if not (options.output_dir / "start" / "adapter_model.safetensors").exists():
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--inside"], check=True)
    print(f"== prepared after {time.perf_counter() - began:.0f} s", flush=True)
    curves = []
    for kind in options.kinds:
        wall = turns[kind].take() if kind in turns else 0.0
        curves.append(read_trl(options, kind, wall) if kind.startswith("trl") else read_ours(options, kind, wall))
        paces = f"{wall:.0f} s, {curves[-1].step_seconds:.3f} s a step, first {WARM_UP_STEPS} "
        print(f"== {kind}: {paces}{curves[-1].warm_up_seconds:.1f} s", flush=True)
        save(options, curves, {})
    print(f"== measured in {measuring.take():.0f} s", flush=True)
    found = json.loads((options.output_dir / "held_out.json").read_text())
    for one in curves:
        one.held_out = [found[name]["loss"] for name in one.adapters]
    save(options, curves, report(curves, options.target))
    print(f"all in {time.perf_counter() - began:.0f} s")


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

    compute = choose_compute(options.device, "bf16" if options.device == "cuda" else "fp32", 0)
    model = ModelConfig(model_name_or_path=options.model)
    data = DataConfig(
        train_files=tuple(options.rows[0]),
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


def finished(options: argparse.Namespace, kind: str) -> bool:
    """Whether a run came to its end."""
    last: Path = options.output_dir / kind / ("report.json" if kind.startswith("trl") else "summary.json")
    return last.exists()


def start_run(options: argparse.Namespace, kind: str) -> Turn:
    """A process that waits to train in a new folder."""
    shutil.rmtree(options.output_dir / kind, ignore_errors=True)
    command = trl_command(options, kind) if kind.startswith("trl") else our_command(options, kind)
    return Turn([sys.executable, *command], options.output_dir / f"{kind}.log")


def our_command(options: argparse.Namespace, kind: str) -> list[str]:
    """launch/train.py from the prepared adapter, with a checkpoint at every measured step and no other measurement."""
    optimizer = "paged_adamw_8bit" if options.device == "cuda" else "adamw_torch"
    return [
        *(str(Path(__file__).with_name("turns.py")), str(REPOSITORY / "launch" / "train.py")),
        *("--model_name_or_path", options.model, "--adapter_path", str(options.output_dir / "start")),
        *("--compute_dtype", kind, "--seed", str(options.seed), "--optimizer", optimizer),
        *("--train_files", *options.rows[0], "--recompute", "none"),
        *("--max_seq_length", str(options.max_seq_length), "--data_cache_dir", str(options.output_dir / "data")),
        *("--global_batch_size", str(options.global_batch_size), "--micro_batch_tokens", "8192"),
        *("--lora_r", str(options.lora_r), "--lora_alpha", str(2 * options.lora_r), "--max_grad_norm", "1.0"),
        *("--learning_rate", str(options.learning_rate), "--lr_scheduler_type", options.lr_scheduler_type),
        *("--warmup_ratio", str(options.warmup_ratio), "--max_steps", str(options.steps), "--sample_prompts"),
        *("--save_steps", str(options.measure_every), "--tracker", "jsonl"),
        *("--save_total_limit", str(len(measured_steps(options)))),
        *("--output_dir", str(options.output_dir / kind), "--device", options.device),
    ]


def read_ours(options: argparse.Namespace, kind: str, wall_seconds: float) -> Curve:
    """What a run of ours wrote."""
    folder = options.output_dir / kind
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "perf/step_seconds" in line]
    seconds = [line["perf/step_seconds"] for line in lines]
    tokens = [round(line["perf/tokens_per_second"] * line["perf/step_seconds"]) for line in lines]
    clock = {step: sum(seconds[WARM_UP_STEPS:step]) for step in measured_steps(options)}
    times = (wall_seconds, sum(seconds[:WARM_UP_STEPS]), clock)
    return curve(options, kind, times, tokens, lines[0]["train/loss"])


def trl_command(options: argparse.Namespace, kind: str) -> list[str]:
    """time_to_loss_trl.py from the prepared adapter."""
    return [
        *(str(Path(__file__).with_name("time_to_loss_trl.py")), "--model", options.model),
        *("--start", str(options.output_dir / "start"), "--rows", str(options.output_dir / "steps.jsonl")),
        *("--output_dir", str(options.output_dir / kind), "--steps", str(options.steps)),
        *("--save_at", *map(str, measured_steps(options))),
        *("--global_batch_size", str(options.global_batch_size), "--micro_batch", str(options.trl_micro_batch)),
        *("--learning_rate", str(options.learning_rate), "--lr_scheduler_type", options.lr_scheduler_type),
        *("--warmup_ratio", str(options.warmup_ratio), "--warm_up_steps", str(WARM_UP_STEPS)),
        *("--dtype", "fp32" if kind == "trl_fp32" else "bf16", "--device", options.device),
        *(["--grouped"] if kind == "trl_grouped" else []),
    ]


def read_trl(options: argparse.Namespace, kind: str, wall_seconds: float) -> Curve:
    """What time_to_loss_trl.py wrote."""
    folder = options.output_dir / kind
    found = json.loads((folder / "report.json").read_text())
    clock = {int(step): value for step, value in found["seconds"].items()}
    times = (wall_seconds, found["warm_up_seconds"], clock)
    return curve(options, kind, times, found["step_tokens"], found["first_loss"])


def measured_steps(options: argparse.Namespace) -> list[int]:
    """Every so many steps."""
    return list(range(options.measure_every, options.steps + 1, options.measure_every))


def adapters_of(options: argparse.Namespace, kind: str) -> list[str]:
    """Folders of the adapters of a run by measured step, the one that it begins with first."""
    folder = options.output_dir / kind
    folder = folder if kind.startswith("trl") else folder / "checkpoints"
    return [str(options.output_dir / "start"), *(str(folder / f"step-{step}") for step in measured_steps(options))]


def curve(
    options: argparse.Namespace,
    kind: str,
    times: tuple[float, float, dict[int, float]],
    step_tokens: list[int],
    first_loss: float,
) -> Curve:
    """Bring a run's times (wall, warm-up, seconds since the end of the warm-up by step) into the common form."""
    steps = measured_steps(options)
    wall_seconds, warm_up_seconds, clock = times
    pace = clock[steps[-1]] / (steps[-1] - WARM_UP_STEPS)
    return Curve(
        kind=kind,
        steps=[0, *steps],
        seconds=[0.0, *(min(step, WARM_UP_STEPS) * pace + max(0.0, clock[step]) for step in steps)],
        tokens=[sum(step_tokens[:step]) for step in (0, *steps)],
        adapters=adapters_of(options, kind),
        first_loss=first_loss,
        step_tokens=step_tokens,
        step_seconds=pace,
        warm_up_seconds=warm_up_seconds,
        wall_seconds=wall_seconds,
        held_out=[],
    )


def start_measuring(options: argparse.Namespace) -> Turn:
    """A process that waits to measure the held-out losses of all adapters of all runs."""
    adapters = dict.fromkeys(Path(name) for kind in options.kinds for name in adapters_of(options, kind))
    flags = ["--max_seq_length", str(options.max_seq_length), "--device", options.device, "--in_turn"]
    command = metrics_command(
        list(adapters), model=options.model, rows=options.rows[1], work_dir=options.output_dir, flags=flags
    )
    return Turn(command, options.output_dir / "held_out.log")


if __name__ == "__main__":
    main()
