"""`bench_sft.py --against`: TRL's SFTTrainer and Unsloth on the same shape and sequences, in processes of their own.

    python tests/gpu/bench_sft_peers.py --model /tmp/llama-33b-8-layers --against trl unsloth --ours out.json

is the same without our runs: for them stands the file that an earlier command on the same GPU wrote. A peer runs
without gradient checkpointing, and with it only if that did not fit: it computes strictly more. Its sequences are
grouped within each step and over all steps; the fastest counts.
Beside the model's folder, MODEL-peers gets a checkpoint of random weights in NF4 (17 GB at llama-33b).
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_sft_sequences import grouped_over, sorted_within, step_rows
from make_nf4 import save_random_nf4

PACKAGES = {"trl": ("trl",), "unsloth": ("trl", "unsloth")}
LAST_LINES = 30  # of a failed peer's output
SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_DISABLE_AUTO_UPDATES": "1",
}


def main() -> None:
    """Run the peers alone, against results of bench_sft.py in a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--ours", type=Path, required=True, help="what bench_sft.py --json wrote")
    options = parser.parse_args()
    refuse(parser, options)
    results = compare(options, json.loads(options.ours.read_text("utf-8")))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if failures(results):
        sys.exit(1)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that bench_sft.py has too."""
    parser.add_argument("--model", required=True, help="shape folder")
    parser.add_argument("--sequences", type=int, default=64, help="of one optimizer step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one of warm-up")
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--max_gpu_memory_gib", type=float)
    parser.add_argument("--against", nargs="+", choices=sorted(PACKAGES), default=[], help="peers, after our runs")
    parser.add_argument("--peer_micro_batch", type=int, default=16, help="sequences of a peer's micro-batch")
    parser.add_argument("--peer_recomputes", action="store_true", help="peers do not even try without checkpointing")
    parser.add_argument("--peer_seconds", type=int, default=900, help="a peer's process that takes longer is ended")
    parser.add_argument("--json", type=Path)


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with an error, before anything runs, where a peer could not."""
    wanted = dict.fromkeys(name for peer in options.against for name in PACKAGES[peer])
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"--against {' '.join(options.against)}: not installed; pip install {' '.join(missing)}")
    if options.against and options.sequences % options.peer_micro_batch:
        parser.error(f"--sequences {options.sequences} is not a multiple of --peer_micro_batch: choose another of them")


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """What a function returns that runs in a new process: the GPU's memory is free again after it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def compare(options: argparse.Namespace, ours: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run each peer; a line for each, and one with our fastest run divided by theirs.

    Args:
        ours: Results of bench_sft.py's runs, with `run` and, unless it ran out of memory, `tokens_per_second`.

    Returns:
        What the lines hold.
    """
    model = Path(options.model).resolve()
    folder = model.with_name(f"{model.name}-peers")
    folder.mkdir(exist_ok=True)
    made_checkpoint(model, folder / "checkpoint")
    (folder / "passes.json").write_text(json.dumps(passes(options)))
    results = []
    for peer in options.against:
        results.append(run_peer(peer, options, folder))
        print(json.dumps(results[-1]), flush=True)
    results.append(ratios(ours, results))
    print(json.dumps(results[-1]), flush=True)
    return results


def failures(results: Sequence[dict[str, Any]]) -> list[str]:
    """Peers of which a process failed otherwise than for want of memory."""
    return [line["peer"] for line in results if any("failed" in tried for tried in line.get("tried", ()))]


def made_checkpoint(model: Path, folder: Path) -> None:
    """Random weights of the shape in NF4 on disk, if they are not there yet."""
    if not folder.exists():
        in_own_process(save_random_nf4, model, folder)
    shape, stored = (json.loads((path / "config.json").read_text("utf-8")) for path in (model, folder))
    if any(shape[key] != stored[key] for key in SHAPE_KEYS):
        sys.exit(f"{folder} has another shape than {model}: delete it")


def passes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a peer trains on, in this order; each timed pass is gone through once before, so that no compiler is timed.

    Our runs have one step of warm-up, then the steps of the first timed pass.
    """
    steps = [step_rows(options.sequences, seed) for seed in range(options.steps + 1)]
    within, over = sorted_within(steps[1:]), grouped_over(steps[1:], options.peer_micro_batch)
    order = [
        ("", [*sorted_within(steps[:1]), *within]),
        ("within each step", within),
        ("", over),
        ("over all steps", over),
    ]
    return [
        {
            "grouped": name,
            "rows": [
                {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for rows in step for row in rows
            ],
            "step_tokens": [sum(map(len, rows)) for rows in step],
        }
        for name, step in order
    ]


def run_peer(peer: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The fastest it did without gradient checkpointing or, where that did not fit, with it; and all that was tried."""
    tried: list[dict[str, Any]] = []
    for checkpointing in (True,) if options.peer_recomputes else (False, True):
        print(f"== {peer}, gradient checkpointing {'on' if checkpointing else 'off'}", flush=True)
        lines = run_process(peer, checkpointing, options, folder)
        tried += [{"gradient_checkpointing": checkpointing, **line} for line in lines]
        if any("tokens_per_second" in line for line in lines):
            break
    found = [line.pop("versions") for line in tried if "versions" in line]
    fastest = max(tried, key=lambda line: float(line.get("tokens_per_second", 0)))
    return {
        "peer": peer,
        **(fastest if "tokens_per_second" in fastest else {}),
        "versions": found[0] if found else {},
        "tried": tried,
    }


def run_process(peer: str, checkpointing: bool, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """What a peer's process reported; if it failed, the end of what it said, so that the other peers still run."""
    report, log = folder / f"{peer}.json", folder / f"{peer}.log"
    report.unlink(missing_ok=True)
    command = [
        *(sys.executable, str(Path(__file__).with_name("bench_sft_trainer.py")), "--peer", peer),
        *("--work_dir", str(folder), "--report", str(report), "--sequences", str(options.sequences)),
        *("--micro_batch", str(options.peer_micro_batch), "--lora_r", str(options.lora_r)),
        *(["--gradient_checkpointing"] if checkpointing else []),
        *(["--max_gpu_memory_gib", str(options.max_gpu_memory_gib)] if options.max_gpu_memory_gib else []),
    ]
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as stream:
        try:
            code: int | str = subprocess.run(
                command,
                cwd=folder,
                env={**os.environ, **OFFLINE},
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=options.peer_seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"not done after {options.peer_seconds} s"
    print(f"{time.perf_counter() - began:.0f} s in all; its output is in {log}", flush=True)
    if code == 0 and report.exists():
        return list(json.loads(report.read_text("utf-8")))
    end = log.read_text("utf-8", errors="replace").splitlines()[-LAST_LINES:]
    print("\n".join(line[:300] for line in end), flush=True)
    return [{"failed": code, "last_line": end[-1][:300] if end else ""}]


def ratios(ours: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Our fastest run in bf16, and in fp8 if there was one, divided by each peer's fastest."""
    timed = [line for line in ours if "run" in line and "tokens_per_second" in line]
    found: dict[str, dict[str, float]] = {}
    for form in (False, True):
        of_form = [line for line in timed if line["run"].endswith(":fp8") == form]
        if of_form:
            best = max(of_form, key=lambda line: float(line["tokens_per_second"]))
            found[best["run"]] = {
                line["peer"]: round(best["tokens_per_second"] / line["tokens_per_second"], 2)
                for line in peers
                if "tokens_per_second" in line
            }
    return {"times_as_fast": found}


if __name__ == "__main__":
    main()
