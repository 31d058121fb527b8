"""The scripts of jobs where no Slurm is needed: srun is a stand-in that has trials without a trace."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from workspace import REPOSITORY, environment, make_workspace

SRUN = """#!/bin/bash
echo called >> srun.calls
rm -rf runs/slurm  # as if the disk had lost everything
[ "$(wc -l < srun.calls)" -lt 5 ] || kill -KILL "$PPID"  # what would go on for ever
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A workspace with scripts of its own, to change env.sh."""
    made = make_workspace(tmp_path / "workspace")
    (made / "slurm").unlink()
    shutil.copytree(REPOSITORY / "slurm", made / "slurm")
    (made / "bin").mkdir()
    (made / "bin" / "srun").write_text(SRUN)
    (made / "bin" / "srun").chmod(0o755)
    return made


def sweep_job(folder: Path) -> subprocess.CompletedProcess[str]:
    ours = environment(folder / "home")
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    return subprocess.run(
        ["bash", "slurm/sweep.sbatch", "ENTITY/PROJECT/ID"],
        cwd=folder,
        env={**ours, **slurm, "PATH": f"{folder / 'bin'}{os.pathsep}{ours['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_trials_that_cannot_be_judged_end_the_task(folder: Path) -> None:
    done = sweep_job(folder)
    assert done.returncode == 1, done.stderr
    assert "FileNotFoundError" in done.stderr
    assert (folder / "srun.calls").read_text().count("called") == 1


def test_env_sh_may_use_unset_variables_as_modules_do(folder: Path) -> None:
    with (folder / "slurm" / "env.sh").open("a") as file:
        file.write('export OF_A_MODULE="$NOT_SET_ANYWHERE:x"\n')
    assert "unbound" not in sweep_job(folder).stderr
    assert (folder / "srun.calls").exists()


def test_an_env_sh_that_fails_is_named(folder: Path) -> None:
    with (folder / "slurm" / "env.sh").open("a") as file:
        file.write("[ -d /no/such/scratch ] && export HF_HOME=/no/such/scratch\n")
    done = sweep_job(folder)
    assert done.returncode == 2
    assert "slurm/env.sh ended with status 1" in done.stderr
