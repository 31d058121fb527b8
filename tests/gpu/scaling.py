"""Speed on 1, 2, 4, 8 GPUs of one machine through launch/train.py: efficiency, memory, communication, equal losses.

    python tests/gpu/make_shape.py --shape llama-33b --train_files ROWS… --output_dir /tmp/llama-33b
    python tests/gpu/scaling.py --shape_dir /tmp/llama-33b --train_files ROWS… --output_dir /tmp/scaling --ranks 1 2 4 8
    python tests/gpu/scaling.py … --objective dpo --config launch/configs/anima_33b_dpo.yaml --train_files PAIRS…
    python tests/gpu/scaling.py … --cap_gib 39 --ranks 2        # the recipe for two cards of 40 GB

Weak scaling: as many sequences a rank, whatever the number of ranks. Strong: the same step on more ranks, with the same
losses. Communication: the same bytes over the same links, alone. `--survive` instead of all that: a rank is killed, and
the run resumed on one rank fewer.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
WARM_UP_STEPS = 2
MARK = "communication seconds"


def main() -> None:
    """Run everything and print a table, or be a rank that measures communication."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape_dir", type=Path, required=True, help="a folder of make_shape.py")
    parser.add_argument("--train_files", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--config", default=str(REPOSITORY / "launch" / "configs" / "anima_33b_sft.yaml"))
    parser.add_argument("--objective", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kinds", nargs="+", choices=["weak", "strong"], default=["weak", "strong"])
    parser.add_argument("--per_rank", type=int, default=16, help="sequences or pairs of a step for each rank")
    parser.add_argument("--steps", type=int, default=8, help=f"of each run, {WARM_UP_STEPS} of them warm-up")
    parser.add_argument("--cap_gib", type=float, help="memory that each rank may take")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU over gloo: does this script run?")
    parser.add_argument("--flags", nargs="*", default=[], metavar="FLAG=VALUE", help="more flags for launch/train.py")
    parser.add_argument("--survive", action="store_true", help="only kill a rank and resume on fewer")
    parser.add_argument("--probe", type=int, help="used by this script itself: trainable parameters")
    options = parser.parse_args()
    if options.probe:
        probe(options.probe, options.rehearse)
        return
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if options.survive:
        survive(options, max(options.ranks))
        return
    measured: dict[tuple[int, int], dict[str, Any]] = {}  # the largest weak run is a strong one too
    runs = []
    for kind in options.kinds:
        for count in options.ranks:
            batch = options.per_rank * (count if kind == "weak" else max(options.ranks))
            if (count, batch) not in measured:
                measured[count, batch] = measure(options, count, batch)
            runs.append({"kind": kind, **measured[count, batch]})
    report(runs)
    (options.output_dir / f"scaling_{options.objective}.json").write_text(json.dumps(runs, indent=1))


def command(options: argparse.Namespace, name: str, count: int, batch: int, *, steps: int, save: int) -> list[str]:
    """launch/train.py under torchrun."""
    flags = [
        *("--config", options.config, "--objective", options.objective, "--random_weights", "True"),
        *("--model_name_or_path", str(options.shape_dir), "--train_files", *options.train_files),
        *("--eval_size", "0", "--eval_steps", "0", "--logging_steps", "1", "--tracker", "jsonl", "--sample_prompts"),
        *("--max_steps", str(steps), "--save_steps", str(save), "--global_batch_size", str(batch)),
        *("--output_dir", str(options.output_dir / name)),
        *("--data_cache_dir", str(options.output_dir / "data")),
        *("--reference_cache_dir", str(options.output_dir / "reference")),
        *(() if options.cap_gib is None else ("--max_gpu_memory_gib", str(options.cap_gib))),
        *(("--device", "cpu", "--lora_r", "8") if options.rehearse else ()),
        *(f"--{flag}" for flag in options.flags),
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return [*torchrun, str(REPOSITORY / "launch" / "train.py"), *flags]


def measure(options: argparse.Namespace, count: int, batch: int) -> dict[str, Any]:
    """One run: speed over the steps behind the warm-up, losses, memory and state of every rank, communication."""
    name = f"{options.objective}-{batch}-on-{count}"
    shutil.rmtree(options.output_dir / name, ignore_errors=True)
    print(f"== {name}: {batch} a step on {count} rank(s)", flush=True)
    begun = time.perf_counter()
    typed = command(options, name, count, batch, steps=options.steps, save=0)
    done = subprocess.run(typed, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\n{name} ended with {done.returncode}")
    (options.output_dir / f"{name}.log").write_text(done.stderr)
    print(f"{time.perf_counter() - begun:.0f} s in all{told(done.stderr)}", flush=True)
    steps = read_steps(options.output_dir / name)
    timed = steps[WARM_UP_STEPS:]
    seconds = sum(step["perf/step_seconds"] for step in timed)
    tokens = sum(step["perf/tokens_per_second"] * step["perf/step_seconds"] for step in timed)
    trainable = int(re.search(r"adapter ([\d,]+) trainable", done.stderr)[1].replace(",", ""))  # type: ignore[index]
    state = re.search(r"optimizer state per rank: (.*)", done.stderr)
    alone = communication(options, count, trainable)
    return {
        "ranks": count,
        "batch": batch,
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds / len(timed),
        "losses": [step["train/loss"] for step in steps],
        "peak_gib": json.loads((options.output_dir / name / "summary.json").read_text())["peak_memory_gib"],
        "optimizer_state": state[1] if state else "",
        "trainable": trainable,
        "communication_seconds": alone,
        "communication_share": alone * len(timed) / seconds,
    }


def told(stderr: str) -> str:
    """What --recompute auto chose, if it did, and the heaviest micro-batch; the rest is in the run's log."""
    wanted = [line for line in stderr.splitlines() if line.startswith(("--recompute auto: ", "heaviest"))]
    return "".join(f"\n{line}" for line in wanted)


def read_steps(run: Path) -> list[dict[str, Any]]:
    """Metrics of the training steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "perf/step_seconds" in line]


def communication(options: argparse.Namespace, count: int, trainable: int) -> float:
    """Seconds of a step's communication by itself, on as many ranks."""
    if count == 1:
        return 0.0
    script = [str(Path(__file__)), "--shape_dir", "-", "--train_files", "-", "--output_dir", "-"]
    script += ["--probe", str(trainable), *(["--rehearse"] if options.rehearse else [])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    done = subprocess.run([*torchrun, *script], check=True, stdout=subprocess.PIPE, text=True)
    return float(next(line.split()[-1] for line in done.stdout.splitlines() if MARK in line))


def probe(trainable: int, on_cpu: bool) -> None:
    """What a step sends: every gradient in fp32, 4 bytes, to the rank that sums it; every parameter back in 2."""
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local)
    if not on_cpu:
        torch.cuda.set_device(device)
    dist.init_process_group("gloo" if on_cpu else "nccl", device_id=None if on_cpu else device)
    share = trainable // dist.get_world_size()
    gradients = torch.zeros(share * dist.get_world_size(), device=device)
    summed = gradients.chunk(dist.get_world_size())[dist.get_rank()]
    mine = torch.zeros(share, dtype=torch.bfloat16, device=device)
    parts = mine.new_empty(share * dist.get_world_size())
    best = float("inf")
    for _ in range(4):
        dist.barrier()
        begun = time.perf_counter()
        dist.reduce_scatter_tensor(summed, gradients)
        dist.all_gather_into_tensor(parts, mine)
        if not on_cpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    if dist.get_rank() == 0:
        print(MARK, best, flush=True)
    dist.destroy_process_group()


def report(runs: list[dict[str, Any]]) -> None:
    """A table; efficiency against one rank of the same kind, or the smallest number of ranks."""
    print("| | ranks | tokens/s | a rank | efficiency | peak GiB a rank | optimizer state a rank | communication |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        first = next(other for other in runs if other["kind"] == run["kind"])
        each = run["tokens_per_second"] / run["ranks"]
        efficiency = each / (first["tokens_per_second"] / first["ranks"])
        peak = ", ".join(f"{value:.1f}" for value in run["peak_gib"])
        print(
            f"| {run['kind']} | {run['ranks']} | {run['tokens_per_second']:,.0f} | {each:,.0f} | {efficiency:.1%} | "
            f"{peak} | {run['optimizer_state']} | {run['communication_share']:.2%} |"
        )
    strong = [run for run in runs if run["kind"] == "strong"]
    apart = [abs(a - b) / abs(b) for run in strong[1:] for a, b in zip(run["losses"], strong[0]["losses"], strict=True)]
    if apart:
        print(f"\nlosses of the strong runs differ by {max(apart):.1e} at most", flush=True)


def survive(options: argparse.Namespace, count: int) -> None:
    """kill -9 one rank of a run that saves, resume on one rank fewer, and reach the end."""
    name, batch = f"{options.objective}-killed", options.per_rank * count
    run = options.output_dir / name
    shutil.rmtree(run, ignore_errors=True)
    typed = command(options, name, count, batch, steps=3 * options.steps, save=2)
    process = subprocess.Popen(typed, cwd=REPOSITORY, start_new_session=True)
    while not (run / "checkpoints" / "latest").exists():
        if process.poll() is not None:
            sys.exit("the run ended before it could be killed")
        time.sleep(0.1)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    process.wait()
    fewer = max(1, count - 1)
    typed = [*command(options, name, fewer, batch, steps=3 * options.steps, save=2), "--resume", "auto"]
    done = subprocess.run(typed, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    resumed = [line for line in done.stderr.splitlines() if "resumed from" in line]
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nthe resumed run ended with {done.returncode}")
    print(f"killed one of {count} ranks; on {fewer}: {resumed[0] if resumed else done.stderr[-2000:]}")
    steps = {step["step"]: step["train/loss"] for step in read_steps(run)}
    print(f"ended after {len(steps)} steps, losses {', '.join(f'{loss:.4f}' for loss in steps.values())}")


if __name__ == "__main__":
    main()
