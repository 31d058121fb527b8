"""slurm/sweep.sbatch on a real Slurm: an array of W&B agents, each on its own GPUs; a preempted trial goes on."""

import re
from typing import Any

import pytest
import yaml
from wandb_standin import ENTITY, serving


@pytest.fixture
def sweep_file(slurm: Any) -> str:
    """The shipped sweep on the small training, one rank a trial."""
    config = yaml.safe_load((slurm.folder / "launch" / "sweeps" / "quickstart_sft.yaml").read_text())
    own = config["parameters"]
    config["parameters"] |= {name: {"value": value} for name, value in slurm.options.items() if name not in own}
    config["command"] = [word.replace("=auto", "=1") if "nproc" in word else word for word in config["command"]]
    (slurm.folder / "sweep.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return "sweep.yaml"


def test_an_array_of_agents_runs_all_trials_and_a_stopped_one_goes_on(slurm: Any, sweep_file: str) -> None:
    """One of the two trials stops in its third step, as if its task were preempted; a requeued task goes on with it."""
    with serving(trials=2) as backend:
        created = slurm.command("wandb", "sweep", sweep_file, more=backend.environment())
        assert created == ""  # it talks on stderr
        (sweep,) = backend.sweeps
        first = backend.sweeps[sweep].waiting[0]
        first["args"]["max_steps"] = {"value": 40}  # so that it can be told from the other
        more = {**backend.environment(), "ANIMA_FAULT": "usr1@step:0:20"}
        words = ["--array=0-1", "--gpus-per-node=2", "slurm/sweep.sbatch", f"{ENTITY}/anima/{sweep}"]
        job = slurm.submit(words, more)
        assert slurm.wait(job) == {"COMPLETED"}, slurm.output(job)
        runs = {run.name: run for run in backend.runs.values()}
    output = slurm.output(job)
    stopped = runs.pop(first["run_id"])
    (other,) = runs.values()
    assert stopped.exit_codes == [75, 0], output
    assert stopped.resumed == 1
    assert other.exit_codes == [0], output
    assert [step for step, _ in stopped.series("train/loss")] == list(range(1, 41))
    assert stopped.summary["eval/loss"] < stopped.series("eval/loss")[0][1]
    gpus = set(re.findall(r"job: task \d, start 1 on \S+ GPUs ([\d,]+)", output))
    nodes = set(re.findall(r"job: task \d, start 1 on (\S+),", output))
    assert len(gpus) == 2 or len(nodes) == 2, output
    assert output.count("job: the sweep has no trial left") == 2
