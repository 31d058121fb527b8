"""Losses that are not finite, full disks, too little memory: what goes on, what ends, and what is said."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anima.train import checkpoint

SMALL_DISK_KIB = 36_000
"""One checkpoint is taken to need 32 MiB and takes 0.4: a run may start, and the ballast decides what fits."""


def test_a_nan_on_one_rank_skips_the_step_on_all_and_training_goes_on(setting: Any) -> None:
    done = setting.run("nan-once", fault="nan@forward:1:3")
    assert done.codes == (0, 0), done.output
    assert "step 3: a gradient is not finite; the step is skipped on every rank" in done.output
    report = json.loads((setting.folder / "nan-once" / "not_finite" / "step-3.json").read_text())
    assert report["ranks_with_a_loss_not_finite"] == [1]
    assert len(report["rows"]) == 4
    assert all("train.jsonl:" in row and "answer" not in row for row in report["rows"])
    last = [row for row in setting.metrics("nan-once") if "train/loss" in row][-1]
    assert last["train/skipped_steps"] == 1
    assert last["train/loss"] < 5


def test_nan_for_ever_stops_and_names_the_last_good_checkpoint(setting: Any) -> None:
    fault = ",".join(f"nan@forward:0:{step}" for step in range(3, 9))
    done = setting.run("nan-for-ever", fault=fault, timeout=60)
    assert done.codes[0] == 3, done.output
    assert "gradients were not finite in 5 steps in a row" in done.output
    root = setting.folder / "nan-for-ever" / "checkpoints"
    assert f"--resume {root}/step-" in done.output
    assert checkpoint.newest_whole(root)[0] is not None


def test_a_save_that_finds_the_disk_full_is_reported_and_the_next_one_succeeds(undisturbed: Any) -> None:
    done = undisturbed.run("full-once", fault="enospc@save.files:0:4")
    assert done.codes == (0, 0), done.output
    assert "step 4: NOT SAVED: [Errno 28] No space left on device" in done.output
    root = undisturbed.folder / "full-once" / "checkpoints"
    assert f"{root}/step-2 stays" in done.output
    assert checkpoint.steps(root) == [2, 6, 8]
    assert undisturbed.metrics("full-once") == undisturbed.metrics("undisturbed")
    assert undisturbed.adapter("full-once") == undisturbed.adapter("undisturbed")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    size = f"size={SMALL_DISK_KIB}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(undisturbed: Any, small_disk: Path) -> None:
    """Full from step 3 on: nothing more is saved, the checkpoint of step 2 stays whole, training reaches the end."""
    name = "on-a-small-disk"
    (small_disk / "run").mkdir()
    (undisturbed.folder / name).symlink_to(small_disk / "run")

    def fill(processes: list[Any]) -> None:
        while not (small_disk / "run" / "checkpoints" / "latest").exists() and processes[0].exitcode is None:
            pass
        free = shutil.disk_usage(small_disk).free
        (small_disk / "ballast").write_bytes(bytes(free - 40_000))

    done = undisturbed.run(name, fault="slow@step:*:3", when=fill)
    root = small_disk / "run" / "checkpoints"
    assert "step 4: NOT SAVED" in done.output, done.output
    assert "step 8: NOT SAVED" in done.output
    assert checkpoint.newest_whole(root)[0] == root / "step-2"
    assert "the adapter could not be written to its place" in done.output
    rescued = re.search(r"it lies in (\S+/adapter):", done.output)
    assert rescued is not None
    assert (Path(rescued[1]) / "adapter_model.safetensors").read_bytes() == undisturbed.adapter("undisturbed")
    shutil.rmtree(Path(rescued[1]).parent)
    assert done.codes[0] == 2
    (small_disk / "ballast").unlink()
    resumed = undisturbed.run(name, "--resume", "auto")
    assert resumed.codes == (0, 0), resumed.output
    assert undisturbed.adapter(name) == undisturbed.adapter("undisturbed")
    assert undisturbed.metrics(name) == undisturbed.metrics("undisturbed")


def test_no_room_for_a_checkpoint_is_found_before_the_first_step(setting: Any, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(4 << 20))
    (small_disk / "run").mkdir()
    (setting.folder / "no-room").symlink_to(small_disk / "run")
    done = setting.run("no-room")
    assert done.codes == (2, 2), done.output
    assert "there is no room for the result" in done.output
    assert "0.03 GiB for one checkpoint" in done.output


def test_memory_that_does_not_suffice_is_found_before_the_first_step(setting: Any) -> None:
    done = setting.run("memory", fault="oom@step:1:0", timeout=60)
    assert done.codes[1] == 7, done.output
    assert "rank 1 ran out of memory before the first step, at the heaviest micro-batch of the run" in done.output
    assert "--micro_batch_tokens" in done.output
    later = setting.run("memory-later", fault="oom@forward:0:3", timeout=60)
    assert later.codes[0] == 7, later.output
    assert "rank 0 ran out of memory in step 3" in later.output
