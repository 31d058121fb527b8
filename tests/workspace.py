"""A folder that looks like the repository to those who start commands in it, with a small training of seconds."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = ("anima", "launch", "slurm", "ds_configs")


def make_workspace(folder: Path) -> Path:
    """Links to the repository's parts, so that all that is written stays in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        (folder / part).symlink_to(REPOSITORY / part)
    return folder


def small_training(folder: Path, model: Path) -> dict[str, str]:
    """Options of a training of eight steps on a tiny model, with the data written into `folder`.

    Dropout is off: the losses are the same on any number of ranks.
    """
    for name, count in (("train", 22), ("eval", 3)):
        rows = [
            {"messages": [{"role": "user", "content": f"q{n}?"}, {"role": "assistant", "content": f"{name} {n}" * 2}]}
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(model),
        "train_files": str(folder / "train.jsonl"),
        "eval_files": str(folder / "eval.jsonl"),
        "data_cache_dir": str(folder / "cache"),
        "compute_dtype": "fp32",
        "lora_r": "16",
        "lora_dropout": "0.0",
        "max_seq_length": "96",
        "global_batch_size": "4",
        "micro_batch_tokens": "128",
        "max_steps": "8",
        "learning_rate": "1e-2",
        "eval_steps": "4",
        "device": "cpu",
    }


def as_argv(options: Mapping[str, str]) -> list[str]:
    """Options as flags."""
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def environment(home: Path) -> dict[str, str]:
    """For commands: no network, no GPU, an own home, this interpreter first on PATH, nothing of W&B or Slurm."""
    strangers = ("WANDB_", "SLURM_", "ANIMA_", "RANK", "LOCAL_", "WORLD_SIZE", "MASTER_")
    home.mkdir(parents=True, exist_ok=True)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(strangers)},
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(("perf/", "memory/"))} for line in lines]


def series(output_dir: Path, name: str) -> list[float]:
    """The values of a metric."""
    return [row[name] for row in metrics(output_dir) if name in row]


def at_most_two_cpus() -> Callable[[], None]:
    """For `preexec_fn`: launchers that start a rank a CPU start two, also on a large machine."""
    two = sorted(os.sched_getaffinity(0))[:2]
    return lambda: os.sched_setaffinity(0, two)
