"""The words of a trial's command, held against wandb's own functions."""

from pathlib import Path

from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from anima.sweeps.command import as_flags, trial_command, with_flags
from anima.sweeps.sweep_file import read_sweep

REPOSITORY = Path(__file__).resolve().parents[2]
VALUES = {"learning_rate": 1e-05, "lora_r": 8, "packing": True, "max_steps": None, "train_files": ["a", "b"]}


def test_flags_are_written_as_the_agent_writes_them() -> None:
    told = wandb_sweeps.create_sweep_command_args({"args": {name: {"value": value} for name, value in VALUES.items()}})
    assert as_flags(VALUES) == told["args"]


def test_the_command_is_cut_at_the_program() -> None:
    sweep = read_sweep(str(REPOSITORY / "launch" / "sweeps" / "quickstart_sft.yaml"))
    front, flags = trial_command(sweep, {"lora_r": 8}, {})
    assert front == ["/usr/bin/env", "torchrun", "--standalone", "--nproc_per_node=auto", "launch/train.py"]
    assert flags[0] == "--config=launch/configs/quickstart_sft.yaml"
    assert flags[-1] == "--lora_r=8"


def test_own_flags_take_the_place_of_given_ones() -> None:
    given = ["--a=1", "--tracker", "wandb", "--list", "x", "y", "--b=2"]
    assert with_flags(given, {"tracker": "jsonl", "list": "z"}) == ["--a=1", "--b=2", "--tracker=jsonl", "--list=z"]
