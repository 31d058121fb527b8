"""Rank numbers come from the launcher alone."""

import pytest

from anima.distributed import Ranks, read_ranks
from anima.errors import ConfigError


def test_the_launchers_variables_count() -> None:
    assert read_ranks({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "1"}) == Ranks(3, 1, 4)
    assert read_ranks({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Ranks()


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
        {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "4"},
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
