"""Rank numbers come from the launcher alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anima.distributed import Ranks, read_ranks
from anima.errors import ConfigError

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


def test_the_launchers_variables_count() -> None:
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "1"}
    assert read_ranks(given | MEETING) == Ranks(3, 1, 4)
    assert read_ranks({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Ranks()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"} | MEETING,
        {"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "4"} | MEETING,
        {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "4"} | MEETING,
        # Each rank would wait half an hour for the others on a port of its own.
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1"},
    ],
)
def test_incomplete_or_contradicting_ones_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        read_ranks(environment)


def test_copies_that_srun_alone_has_started_are_refused() -> None:
    """Each would take itself for rank 0 of a run of its own, and all would write into one folder."""
    with pytest.raises(ConfigError) as caught:
        read_ranks({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"})
    assert "srun started 8 copies" in str(caught.value)
    assert "slurm/train.sbatch" in str(caught.value)


def test_a_single_process_minds_no_address_that_is_left_from_elsewhere() -> None:
    script = """
import torch
from anima import distributed
distributed.start(distributed.read_ranks(), torch.device("cpu"))
print(distributed.gather_objects("one"))
distributed.stop()
"""
    ours = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**ours, "MASTER_ADDR": "node-of-another-job"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "['one']\n", done.stderr
