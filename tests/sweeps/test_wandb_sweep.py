"""A shipped sweep by wandb's own client and agent, two ranks a trial, against a stand-in of W&B's servers."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from wandb_standin import ENTITY, Backend, Run, serving
from workspace import at_most_two_cpus, environment, make_workspace, series, small_training

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
    """Two trials, by one agent."""
    folder = make_workspace(tmp_path_factory.mktemp("wandb_sweep") / "workspace")
    config = yaml.safe_load((folder / SHIPPED).read_text())
    options = small_training(folder, tiny_llama_dir)
    own = config["parameters"]
    config["parameters"] |= {k: {"value": v} for k, v in options.items() if k not in own}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with serving(trials=2) as backend:
        env = environment(folder / "home") | backend.environment()
        created = _run(folder, env, "wandb", "sweep", "sweep.yaml")
        (sweep,) = re.findall(rf"wandb agent {ENTITY}/anima/(\w+)", created)
        output = _run(folder, env, "wandb", "agent", f"{ENTITY}/anima/{sweep}")
    return Swept(backend, folder, sweep, tuple(backend.runs.values()), output)


def _run(folder: Path, env: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=env,
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
        assert len(list((swept.output_dir(run) / "wandb").glob("run-*"))) == 1
        assert run.exit_codes == [0]


def test_the_stand_in_knew_what_mattered(swept: Swept) -> None:
    optional = {"OrganizationCoreWeaveOrganizationID", "ServerFeaturesQuery", "ServerInfo", "ProbeServerCapabilities"}
    assert set(swept.backend.unknown) <= optional


def test_trials_share_the_tokens(swept: Swept) -> None:
    prepared = [path for path in (swept.folder / "cache").iterdir() if path.is_dir()]
    assert len(prepared) == 2  # training and held-out rows, once for all starts
