"""A shipped sweep by wandb's own client and agent, two ranks a trial, against a stand-in of W&B's servers."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from wandb_standin import ENTITY, Backend, Run, serving
from workspace import at_most_two_cpus, environment, make_workspace, metrics, series, small_training

SHIPPED = "launch/sweeps/quickstart_sft.yaml"


@dataclass(frozen=True)
class Swept:
    """What lies where after the sweep."""

    backend: Backend
    folder: Path
    sweep: str
    trials: tuple[Run, ...]
    output: str

    def output_dir(self, run: Run) -> Path:
        return self.folder / "runs" / "sweeps" / self.sweep / run.name


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Swept:
    """Two trials; the first agent's is preempted in its third step, the second agent is handed it again."""
    folder = make_workspace(tmp_path_factory.mktemp("wandb_sweep") / "workspace")
    config = yaml.safe_load((folder / SHIPPED).read_text())
    options = small_training(folder, tiny_llama_dir)
    own = config["parameters"]
    config["parameters"] |= {k: {"value": v} for k, v in options.items() if k not in own}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with serving(trials=2) as backend:
        env = environment(folder / "home") | backend.environment()
        run = _runner(folder, env)
        created = run(["wandb", "sweep", "sweep.yaml"], {})
        (sweep,) = re.findall(rf"wandb agent {ENTITY}/anima/(\w+)", created)
        agent = ["wandb", "agent", f"{ENTITY}/anima/{sweep}"]
        output = run([*agent, "--count", "1"], {"ANIMA_FAULT": "usr1@step:1:3"})
        (preempted,) = backend.runs.values()
        assert preempted.exit_codes == [75], output
        output += run(agent, {})
    return Swept(backend, folder, sweep, tuple(backend.runs.values()), output)


def _runner(folder: Path, env: dict[str, str]) -> Callable[[list[str], dict[str, str]], str]:
    def run(command: list[str], more: dict[str, str]) -> str:
        done = subprocess.run(
            command,
            cwd=folder,
            env=env | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
            preexec_fn=at_most_two_cpus(),
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def test_parameters_and_metrics_of_every_trial_arrive(swept: Swept) -> None:
    assert len(swept.trials) == 2
    tried = [
        tuple(run.values()[name] for name in ("learning_rate", "lora_r", "lora_alpha", "lora_dropout"))
        for run in swept.trials
    ]
    assert [values[1:] for values in tried] == [(4, 16, 0.0), (16, 32, 0.05)]
    assert tried[0][0] < tried[1][0]
    for run, values in zip(swept.trials, tried, strict=True):
        saved = yaml.safe_load((swept.output_dir(run) / "config.yaml").read_text())
        assert (float(saved["learning_rate"]), saved["lora_r"], saved["lora_alpha"], saved["lora_dropout"]) == values
        assert run.sweep == swept.sweep
        assert run.values()["seed"] == 42  # not of the sweep: the whole config is there
        losses = series(swept.output_dir(run), "eval/loss")
        assert [value for _, value in run.series("eval/loss")] == pytest.approx(losses)
        assert run.summary["eval/loss"] == pytest.approx(losses[-1])
        assert run.summary["world_size"] == 2


def test_only_rank_0_talks(swept: Swept) -> None:
    for run in swept.trials:
        assert [step for step, _ in run.series("train/loss")] == list(range(1, 9))  # two voices would interleave
        folders = [path for path in (swept.output_dir(run) / "wandb").iterdir() if path.name.startswith("run-")]
        assert len(folders) == len(run.exit_codes)


def test_a_preempted_trial_comes_back_and_goes_on(swept: Swept) -> None:
    first, second = swept.trials
    assert first.exit_codes == [75, 0]
    assert first.resumed == 1
    assert second.exit_codes == [0]
    rows = [row["step"] for row in metrics(swept.output_dir(first)) if "train/loss" in row]
    assert rows == list(range(1, 9))
    assert "resumed from" in swept.output
    assert len(list((swept.output_dir(first) / "checkpoints").glob("step-*"))) == 1  # where it stopped


def test_the_stand_in_knew_what_mattered(swept: Swept) -> None:
    optional = {"OrganizationCoreWeaveOrganizationID", "ServerFeaturesQuery", "ServerInfo", "ProbeServerCapabilities"}
    assert set(swept.backend.unknown) <= optional


def test_trials_share_the_tokens(swept: Swept) -> None:
    prepared = [path for path in (swept.folder / "cache").iterdir() if path.is_dir()]
    assert len(prepared) == 2  # training and held-out rows, once for all starts
