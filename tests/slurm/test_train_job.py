"""slurm/train.sbatch on a real Slurm: two nodes as one process, time limits, requeue, cancel, mistakes."""

import json
from typing import Any

import pytest
from conftest import Launch
from workspace import as_argv, metrics, series

SLOW = {"ANIMA_FAULT": "slow@step:*:*"}
"""Half a second a step: time to send something in between."""


@pytest.fixture(scope="module")
def two_nodes(slurm: Any) -> str:
    """A job that nothing disturbs, with the base staged; its id."""
    job = slurm.train("whole", more={"ANIMA_BASE_STAGING_DIR": str(slurm.folder / "staged")})
    assert slurm.wait(job) == {"COMPLETED"}, slurm.output(job)
    return job


def test_two_nodes_train_as_one_process_does(slurm: Any, two_nodes: str, launch: Launch) -> None:
    alone = slurm.folder / "runs" / "alone"
    done = launch(as_argv({**slurm.options, "output_dir": str(alone)}))
    assert done.returncode == 0, done.stderr
    whole = slurm.folder / "runs" / "whole"
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        assert series(whole, name) == pytest.approx(series(alone, name), rel=2e-5), name
    assert len(series(whole, "train/loss")) == 8
    assert json.loads((whole / "summary.json").read_text())["world_size"] == 2


def test_tokens_are_prepared_once_and_every_rank_has_a_log(slurm: Any, two_nodes: str) -> None:
    output = slurm.output(two_nodes)
    assert "job: train: rows 22" in output  # before any rank starts
    assert output.index("job: train: rows 22") < output.index("job: start 1")
    logs = slurm.folder / "runs" / "slurm" / two_nodes
    assert "reused" in (logs / "rank-0.log").read_text()
    assert {path.name for path in logs.glob("*.log")} == {"rank-0.log", "rank-1.log", "node-0.log", "node-1.log"}
    assert (logs / "rank-0.log").read_text() in output
    assert "loss" in (logs / "rank-0.log").read_text()
    assert "step " not in (logs / "rank-1.log").read_text()


def test_the_base_is_staged_once_and_the_adapter_names_the_original(slurm: Any, two_nodes: str) -> None:
    logs = slurm.folder / "runs" / "slurm" / two_nodes
    texts = "".join((logs / f"rank-{rank}.log").read_text() for rank in (0, 1))
    assert texts.count("base: copied ") == 1  # both nodes of this cluster have the same disk
    adapter = slurm.folder / "runs" / "whole" / "adapter" / "adapter_config.json"
    assert json.loads(adapter.read_text())["base_model_name_or_path"] == slurm.options["model_name_or_path"]


def test_a_finished_run_is_not_run_again(slurm: Any, two_nodes: str) -> None:
    job = slurm.train("whole")
    assert slurm.wait(job) == {"COMPLETED"}
    assert "holds the finished run: nothing to do" in slurm.output(job)
    assert "job: start" not in slurm.output(job)


def test_a_mistake_ends_the_job_before_any_rank(slurm: Any) -> None:
    job = slurm.train("mistake", "--learning_rat", "1")
    assert slurm.wait(job) == {"FAILED"}
    assert "did you mean learning_rate?" in slurm.output(job)
    assert "job: start" not in slurm.output(job)
    assert slurm.restarts(job) == 0
    assert "ExitCode=2:0" in slurm.command("scontrol", "show", "job", job)


def test_near_its_time_limit_a_job_saves_requeues_itself_and_ends_with_equal_losses(slurm: Any, two_nodes: str) -> None:
    """The signal is sent by hand, as Slurm sends it for --signal=B:USR1@300; its clock ticks every half minute."""
    job = slurm.train("limit", sbatch=["--time=60"], more=SLOW)
    slurm.wait(job, until=lambda: slurm.steps("limit") >= 3)
    slurm.command("scancel", "--signal=USR1", "--batch", job)
    assert slurm.wait(job) == {"COMPLETED"}, slurm.output(job)
    output = slurm.output(job)
    assert slurm.restarts(job) == 1
    assert "stopped: SIGUSR1 after step" in output
    assert "job: requeue: its time is up; checkpoint at step" in output
    assert "job: start 2" in output
    assert "resumed from" in output
    assert "Traceback" not in output
    assert metrics(slurm.folder / "runs" / "limit") == metrics(slurm.folder / "runs" / "whole")


def test_requeued_by_hand_it_saves_and_starts_again_and_cancelled_it_stays_down(slurm: Any) -> None:
    job = slurm.train("handled", "--max_steps", "40", more=SLOW)
    slurm.wait(job, until=lambda: slurm.steps("handled") >= 3)
    slurm.command("scontrol", "requeue", job)
    slurm.wait(job, until=lambda: "job: start 2" in slurm.output(job))
    assert "stopped: SIGTERM after step" in slurm.output(job)
    assert len(slurm.checkpoints("handled")) == 1
    slurm.command("scancel", job)
    assert slurm.wait(job) == {"CANCELLED"}
    assert slurm.restarts(job) == 1
    assert not (slurm.folder / "runs" / "handled" / "summary.json").exists()
