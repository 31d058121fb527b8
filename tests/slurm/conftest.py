"""A real Slurm of a controller and two nodes for the tests of this folder, and jobs in it."""

import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from workspace import as_argv, environment, make_workspace, small_training

REQUIRED = "ANIMA_REQUIRE_SLURM"
"""Set to 1 by .ci/run: then a missing Slurm is a failure, never a skip."""
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"}
PATIENCE = 300.0


@dataclass(frozen=True)
class Slurm:
    """The cluster, and the folder that jobs are submitted from.

    Attributes:
        folder: Workspace.
        options: Of the small training.
        environment: For client commands and, through them, jobs.
    """

    folder: Path
    options: Mapping[str, str]
    environment: Mapping[str, str]

    def command(self, *words: str, check: bool = True, more: Mapping[str, str] | None = None) -> str:
        """What a command prints."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**self.environment, **(more or {})},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def train(self, name: str, *flags: str, sbatch: Sequence[str] = (), more: Mapping[str, str] | None = None) -> str:
        """Submit a training of two nodes with one rank each into runs/NAME; returns the job's id."""
        given = {flag for flag in flags if flag.startswith("--")}
        options = {key: value for key, value in self.options.items() if f"--{key}" not in given}
        argv = as_argv({**options, "output_dir": f"runs/{name}"})
        return self.submit(["--nodes=2", *sbatch, "slurm/train.sbatch", *argv, *flags], more)

    def submit(self, words: Sequence[str], more: Mapping[str, str] | None = None) -> str:
        """sbatch; returns the job's id."""
        # One way of overcommitting the machine: every job may have as many CPUs as a node says it has.
        return self.command("sbatch", "--parsable", "--cpus-per-task=2", *words, more=more).strip()

    def output(self, job: str) -> str:
        """What the job has printed so far."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob(f"slurm-{job}*.out")))

    def states(self, job: str) -> set[str]:
        """State of the job, or of all tasks of an array."""
        lines = self.command("scontrol", "show", "job", "--oneliner", job).splitlines()
        return {
            word.removeprefix("JobState=") for line in lines for word in line.split() if word.startswith("JobState=")
        }

    def restarts(self, job: str) -> int:
        """How often Slurm has started the job anew."""
        words = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return int(next(word for word in words if word.startswith("Restarts=")).removeprefix("Restarts="))

    def wait(self, job: str, until: Callable[[], bool] | None = None) -> set[str]:
        """Until the job has ended, or something holds; a job that ends before is a failure.

        Returns:
            The states that it has ended with.
        """
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if until is not None and until():
                return set()
            if (states := self.states(job)) <= ENDED:
                assert until is None, f"{states}\n{self.output(job)}"
                return states
            time.sleep(0.1)
        pytest.fail(f"job {job} does not come to that: {self.states(job)}\n{self.output(job)}")

    def steps(self, name: str) -> int:
        """Lines of metrics so far."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def checkpoints(self, name: str) -> list[int]:
        """Steps of the checkpoints."""
        folders = (self.folder / "runs" / name / "checkpoints").glob("step-*")
        return sorted(int(path.name.removeprefix("step-")) for path in folders)


def _local_slurm() -> object:
    spec = importlib.util.spec_from_file_location("local_slurm", Path(__file__).with_name("local_slurm.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Iterator[Slurm]:
    """The cluster, for all tests of the folder."""
    local = _local_slurm()
    if reason := local.missing():  # type: ignore[attr-defined]
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, and {reason}")
        pytest.skip(reason)
    folder = make_workspace(tmp_path_factory.mktemp("slurm") / "workspace")
    state = tmp_path_factory.mktemp("cluster")
    env = environment(folder / "home") | {"SLURM_CONF": str(state / "slurm.conf"), "ANIMA_RANKS_PER_NODE": "1"}
    local.start(state)  # type: ignore[attr-defined]
    try:
        yield Slurm(folder, small_training(folder, tiny_llama_dir), env)
    finally:
        local.stop(state)  # type: ignore[attr-defined]
