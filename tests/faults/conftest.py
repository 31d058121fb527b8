"""Runs of launch/train.py on tiny models that can be killed, hung and starved, in seconds each."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PRELOADED = ("torch.distributed", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets", "tyro", "pyarrow")
OPTIONS = {
    "quantization": "nf4",
    "compute_dtype": "fp32",
    "lora_r": 16,
    "lora_dropout": 0.1,
    "max_seq_length": 96,
    "global_batch_size": 4,
    "micro_batch_tokens": 128,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.25,
    "logging_steps": 3,
    "eval_steps": 4,
    "save_steps": 2,
    "device": "cpu",
}
"""Dropout on, a schedule that depends on the step, lines of metrics that a checkpoint cuts in two."""


@dataclass(frozen=True)
class Ended:
    """Ranks that are no more."""

    codes: tuple[int | None, ...]
    output: str
    seconds: float


@dataclass(frozen=True)
class Setting:
    """Where runs of one test happen."""

    folder: Path
    files: Mapping[str, str]

    def run(
        self,
        name: str,
        *options: str,
        ranks: int = 2,
        fault: str = "",
        when: Callable[[list[Any]], None] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> Ended:
        """Run launch/train.py into `name`; when a rank is killed the others are as well, as a launcher does.

        Args:
            name: Output folder.
            options: More flags.
            ranks: Number of processes.
            fault: ANIMA_FAULT.
            when: Called with the processes while they run, to send signals.
            environment: More variables.
            timeout: Seconds until all are killed, which fails the test.
        """
        context = multiprocessing.get_context("forkserver")
        given = {option for option in options if option.startswith("--")}
        argv = ["--output_dir", str(self.folder / name), *options]
        for option, value in {**self.files, **OPTIONS}.items():
            argv += [] if f"--{option}" in given else [f"--{option}", str(value)]
        port, began = _free_port(), time.monotonic()
        processes = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            task = {
                "REPOSITORY": str(REPOSITORY),
                "LOG": str(self.folder / f"{name}.rank{rank}.log"),
                "ARGV": argv,
                "ENVIRONMENT": {
                    **{key: str(value) for key, value in place.items()},
                    "MASTER_ADDR": "127.0.0.1",
                    "ANIMA_FAULT": fault,
                    "WANDB_MODE": "offline",
                    **(environment or {}),
                },
            }
            script = str(Path(__file__).with_name("rank_of_a_run.py"))
            processes.append(context.Process(target=runpy.run_path, args=(script, task, "__rank__"), daemon=True))
        for process in processes:
            process.start()
        try:
            if when is not None:
                when(processes)
            self._wait(processes, began + timeout, name)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return Ended(tuple(p.exitcode for p in processes), self.output(name, ranks), time.monotonic() - began)

    def _wait(self, processes: Sequence[Any], deadline: float, name: str) -> None:
        grace = None
        while any(process.exitcode is None for process in processes):
            codes = [process.exitcode for process in processes]
            if -signal.SIGKILL in codes:
                return
            if grace is None and any(code not in (None, 0) for code in codes):
                grace = time.monotonic() + 20  # a launcher's patience with the others
            if grace is not None and time.monotonic() > grace:
                return
            if time.monotonic() > deadline:
                pytest.fail(f"not done in time:\n{self.output(name, len(processes))}")
            time.sleep(0.02)

    def output(self, name: str, ranks: int) -> str:
        """What the ranks printed."""
        logs = [self.folder / f"{name}.rank{rank}.log" for rank in range(ranks)]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Lines of metrics without what depends on the clock."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith(("perf/", "memory/"))} for row in rows]

    def adapter(self, name: str) -> bytes:
        """The final adapter, byte by byte."""
        return (self.folder / name / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training rows of very different lengths, and a few held-out ones."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 22), ("eval", 3)):
        rows = []
        for number in range(count):
            answer = f"{name} answer {number}" * (1 + number % 3)
            messages = [{"role": "user", "content": f"q{number}?"}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"messages": messages}))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "train.jsonl", folder / "eval.jsonl"


@pytest.fixture(scope="session")
def setting(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, data_files: tuple[Path, Path]) -> Setting:
    """Everything a run needs."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(PRELOADED))
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    folder = tmp_path_factory.mktemp("runs")
    files = {
        "model_name_or_path": str(tiny_llama_dir),
        "train_files": str(data_files[0]),
        "eval_files": str(data_files[1]),
        "data_cache_dir": str(folder / "cache"),
    }
    return Setting(folder, files)


@pytest.fixture(scope="session")
def undisturbed(setting: Setting) -> Setting:
    """With the finished run `undisturbed`, which others are compared with."""
    done = setting.run("undisturbed")
    assert done.codes == (0, 0), done.output
    return setting


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
