"""Is `--compute_dtype fp8` (or fp8_backward) harmless? SFT and DPO on real weights in bf16 and in it under several
seeds, on one GPU.

    python tests/gpu/fp8_curves.py --model .models/smollm2-135m-instruct --sft_files ROWS… --dpo_files PAIRS… \\
        --output_dir /tmp/curves --json curves.json

A seed changes LoRA's start and the order of the rows; the held-out rows are the same for all. Runs of a small model
are bound by the host, so several share the GPU. What is finished in --output_dir is not run again.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from held_out import REPOSITORY, metrics_of, split_files

from anima.tracking.metrics_file import read_metrics

LAST_STEPS = 50
SMOOTHED_OVER = 20
PROMPTS = ("Why is the sky blue?", "Give three tips for staying healthy.", "请介绍一下北京。")
METRICS = ("loss", "rewards/accuracies", "rewards/margins")


@dataclass
class Run:
    """One training run and what it left."""

    objective: str
    dtype: str
    seed: int
    train_loss: list[float] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    tokens_per_second: float = 0.0
    seconds: float = 0.0
    in_bf16: dict[str, float] = field(default_factory=dict)
    """Held-out metrics of the adapter computed in bf16, whatever it was trained in."""

    @property
    def name(self) -> str:
        """Of the folder and in tables."""
        return f"{self.objective}-{self.dtype}-{self.seed}"

    @property
    def final(self) -> dict[str, float]:
        """Held-out metrics behind the last step."""
        return self.held_out[-1]

    @property
    def last_train_loss(self) -> float:
        """Mean over the last steps."""
        return statistics.fmean(self.train_loss[-LAST_STEPS:])


def main() -> None:
    """Train all, then compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder with real weights, 16 bit or NF4")
    parser.add_argument("--sft_files", nargs="*", type=Path, default=[], help="conversations; none: no SFT")
    parser.add_argument("--dpo_files", nargs="*", type=Path, default=[], help="preference pairs; none: no DPO")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="all curves; written after every run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="two or more")
    parser.add_argument("--form", choices=("fp8", "fp8_backward"), default="fp8", help="what is compared with bf16")
    parser.add_argument("--steps", type=int, default=300, help="of SFT")
    parser.add_argument("--dpo_steps", type=int, default=300)
    parser.add_argument("--eval_steps", type=int, default=50)
    parser.add_argument("--held_out_share", type=float, default=0.1, help="of every file")
    parser.add_argument("--at_once", type=int, default=6, help="runs that share the GPU")
    parser.add_argument("--max_seq_length", type=int, default=1024)
    parser.add_argument("--global_batch_size", type=int, default=16)
    parser.add_argument("--micro_batch_tokens", type=int, default=8192)
    parser.add_argument("--new_tokens", type=int, default=64, help="of a sample answer")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: fp8 is emulated")
    parser.add_argument("--flags", nargs="*", default=[], metavar="FLAG=VALUE", help="more flags for launch/train.py")
    options = parser.parse_args()
    if len(options.seeds) < 2:
        parser.error("the noise between seeds needs two of them")
    options.output_dir = options.output_dir.resolve()
    options.model = str(Path(options.model).resolve())
    threads = max(1, (os.cpu_count() or 1) // options.at_once)
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(OMP_NUM_THREADS=str(threads))
    files = {"dpo": options.dpo_files, "sft": options.sft_files}  # the longer runs first
    data = {
        objective: split_files(paths, options.output_dir / f"rows-{objective}", options.held_out_share)
        for objective, paths in files.items()
        if paths
    }
    runs = [Run(*key) for key in itertools.product(data, ("bf16", options.form), options.seeds)]
    finished = train_all(options, data, runs)
    verdicts = {}
    for objective in data:
        if of_it := [run for run in finished if run.objective == objective]:
            measure_in_bf16(options, data[objective][1], of_it)
            verdicts[objective] = compare(objective, options.form, of_it)
    save(options, finished, verdicts)
    if len(finished) < len(runs):
        sys.exit(f"{len(runs) - len(finished)} of {len(runs)} runs failed")


def save(options: argparse.Namespace, runs: list[Run], verdicts: dict[str, Any]) -> None:
    """All curves and settings as JSON."""
    settings = {name: str(value) for name, value in vars(options).items()}
    text = json.dumps({"settings": settings, "verdicts": verdicts, "runs": [asdict(run) for run in runs]})
    options.json.write_text(text, "utf-8")


def command(options: argparse.Namespace, data: tuple[list[str], list[str]], run: Run) -> list[str]:
    """launch/train.py for one run."""
    (train, held_out), folder = data, options.output_dir
    dtype = "auto" if options.device == "cpu" and run.dtype == "bf16" else run.dtype  # a CPU may have to emulate it
    by_objective = {
        "sft": ("--max_steps", str(options.steps), "--learning_rate", "2e-4", "--lr_scheduler_type", "cosine"),
        "dpo": (
            *("--max_steps", str(options.dpo_steps), "--learning_rate", "5e-5", "--lr_scheduler_type", "cosine"),
            *("--beta", "0.1", "--reference_cache_dir", str(folder / f"reference-{run.name}")),
        ),
    }
    return [
        *(sys.executable, str(REPOSITORY / "launch" / "train.py"), "--objective", run.objective),
        *("--model_name_or_path", options.model, "--compute_dtype", dtype, "--seed", str(run.seed)),
        *("--train_files", *train, "--eval_files", *held_out, "--eval_steps", str(options.eval_steps)),
        *("--max_seq_length", str(options.max_seq_length), "--data_cache_dir", str(folder / "data")),
        *("--data_workers", "2", "--global_batch_size", str(options.global_batch_size), "--recompute", "none"),
        *("--micro_batch_tokens", str(options.micro_batch_tokens)),
        *("--lora_r", "16", "--lora_alpha", "32", "--max_grad_norm", "1.0", "--warmup_ratio", "0.03"),
        *("--sample_prompts", *PROMPTS, "--sample_max_new_tokens", str(options.new_tokens)),
        *("--tracker", "jsonl"),
        *("--output_dir", str(folder / run.name), "--device", options.device, *by_objective[run.objective]),
        *(f"--{flag}" for flag in options.flags),
    ]


def train_all(options: argparse.Namespace, data: dict[str, Any], runs: list[Run]) -> list[Run]:
    """Every run in a process of its own, so many at once; those that came to an end, in the given order."""
    done: list[Run] = []
    with ThreadPoolExecutor(options.at_once) as pool:
        waiting = {pool.submit(train, options, data[run.objective], run): run for run in runs}
        for future in as_completed(waiting):
            run = waiting[future]
            problem = future.result()
            if problem:
                print(f"== {run.name} FAILED\n{problem}", flush=True)
                continue
            read(options.output_dir / run.name, run)
            done.append(run)
            print(f"== {run.name}: held-out loss {run.final['loss']:.4f}, {run.seconds:.0f} s", flush=True)
            save(options, done, {})
    return [run for run in runs if run in done]


def train(options: argparse.Namespace, data: tuple[list[str], list[str]], run: Run) -> str:
    """One run, unless it is there already; returns the end of its log if it failed, else nothing."""
    folder = options.output_dir / run.name
    if (folder / "summary.json").exists():
        return ""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    log = options.output_dir / f"{run.name}.log"
    began = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(command(options, data, run), cwd=REPOSITORY, stdout=file, stderr=file).returncode
    run.seconds = time.perf_counter() - began
    return f"{log.read_text(errors='replace')[-3000:]}\nended with {code}" if code else ""


def read(folder: Path, run: Run) -> None:
    """Fill in what a finished run wrote."""
    lines = read_metrics(folder / "metrics.jsonl")
    run.train_loss = [line["train/loss"] for line in lines if "train/loss" in line]
    run.held_out = [
        {name.removeprefix("eval/"): value for name, value in line.items() if name == "step" or "eval/" in name}
        for line in lines
        if "eval/loss" in line
    ]
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    run.samples = summary["samples_after"]
    run.tokens_per_second = summary["tokens_per_second"]


def measure_in_bf16(options: argparse.Namespace, rows: list[str], runs: list[Run]) -> None:
    """Adapters are used in bf16 too: the same computation for all of them."""
    adapters = [options.output_dir / run.name / "adapter" for run in runs]
    flags = ["--max_seq_length", str(options.max_seq_length), "--device", options.device]
    flags += ["--objective", runs[0].objective, "--micro_batch_tokens", str(options.micro_batch_tokens)]
    try:
        found = metrics_of(adapters, model=options.model, rows=rows, work_dir=options.output_dir, flags=flags)
    except subprocess.CalledProcessError as error:
        print(f"the adapters could not be measured in bf16: {error}", flush=True)
        return
    for run, metrics in zip(runs, found, strict=True):
        run.in_bf16 = metrics


def smoothed(losses: list[float]) -> list[float]:
    """Running means of the training loss."""
    width = min(SMOOTHED_OVER, len(losses))
    return [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


def apart(one: Run, other: Run) -> float:
    """Mean distance of two smoothed curves."""
    pairs = zip(smoothed(one.train_loss), smoothed(other.train_loss), strict=True)
    return statistics.fmean(abs(a - b) for a, b in pairs)


def compare(objective: str, form: str, runs: list[Run]) -> dict[str, Any]:
    """Tables and the verdict of one objective: held-out numbers as trained (in fp8 where so), and all in bf16."""
    metrics = [name for name in METRICS if name in runs[0].final]
    columns = [f"{name}, {how}" for name in metrics for how in ("as trained", "in bf16")]
    print(f"\n## {objective}\n| run | before | {' | '.join(columns)} | train loss, last {LAST_STEPS} steps |")
    print("|" + "---|" * (len(columns) + 3))
    for run in runs:
        values = " | ".join(f"{part.get(m, math.nan):.4f}" for m in metrics for part in (run.final, run.in_bf16))
        print(f"| {run.name} | {run.held_out[0]['loss']:.4f} | {values} | {run.last_train_loss:.4f} |")
    by_key = {(run.dtype, run.seed): run for run in runs}
    seeds = [seed for dtype, seed in by_key if dtype == "bf16" and (form, seed) in by_key]
    if len(seeds) < 2:
        print("too few pairs of runs to compare")
        return {}
    bf16, fp8 = ([by_key[dtype, seed] for seed in seeds] for dtype in ("bf16", form))
    verdict: dict[str, Any] = {}
    for name in metrics:
        verdict[name] = judge(f"{name}, as trained", *([run.final[name] for run in kind] for kind in (bf16, fp8)))
        if all(run.in_bf16 for run in bf16 + fp8):
            again = ([run.in_bf16[name] for run in kind] for kind in (bf16, fp8))
            verdict[f"{name} in bf16"] = judge(f"{name}, in bf16", *again)
    verdict["train loss"] = judge("train loss", *([run.last_train_loss for run in kind] for kind in (bf16, fp8)))
    verdict["curves fp8 - bf16"] = [apart(a, b) for a, b in zip(bf16, fp8, strict=True)]
    verdict["curves of two seeds"] = apart(bf16[0], bf16[1])
    between = ", ".join(f"{value:.4f}" for value in verdict["curves fp8 - bf16"])
    print(f"smoothed training curves, mean distance: fp8 from bf16 {between} (seeds {seeds}); ", end="")
    print(f"bf16 seed {seeds[0]} from seed {seeds[1]} {verdict['curves of two seeds']:.4f}")
    for run in (bf16[0], fp8[0]):
        for sample in [sample for sample in run.samples if sample["label"] != "reference"][:2]:
            print(f"{run.name}: {sample['prompt']}\n    {sample['answer'][:300]!r}")
    return verdict


def judge(name: str, bf16: list[float], fp8: list[float]) -> dict[str, Any]:
    """fp8 - bf16 under every seed beside the noise: the standard deviation between the seeds of bf16."""
    differences = [b - a for a, b in zip(bf16, fp8, strict=True)]
    mean, noise = statistics.fmean(differences), statistics.stdev(bf16)
    shown = " ".join(f"{value:+.4f}" for value in differences)
    word = "within" if abs(mean) <= noise else "BEYOND"
    print(f"{name}: fp8 - bf16: {mean:+.4f} ({shown}), between seeds: {noise:.4f} -> {word} seed noise", flush=True)
    return {"bf16": bf16, "fp8": fp8, "mean_difference": mean, "between_seeds": noise, "within": abs(mean) <= noise}


if __name__ == "__main__":
    main()
