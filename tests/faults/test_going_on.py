"""What a resumed run may change, what it may not, and that it knows when it is not the run that was saved."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from anima.train import checkpoint


@pytest.fixture(scope="module")
def half(setting: Any) -> Any:
    """With the run `half`, killed in step 5 on one rank; its checkpoints are of steps 2 and 4."""
    done = setting.run("half", "--logging_steps", "1", ranks=1, fault="slow@step:0:5,kill@step:0:6")
    assert done.codes == (-9,), done.output
    return setting


def resumed(setting: Any, name: str, *options: str, **more: Any) -> Any:
    """Go on, in a copy of the folder."""
    shutil.copytree(setting.folder / "half", setting.folder / name)
    return setting.run(name, "--resume", "auto", "--logging_steps", "1", *options, ranks=1, **more)


def test_what_may_change_takes_effect_and_is_said(half: Any) -> None:
    done = resumed(half, "faster", "--learning_rate", "0.5", "--lr_scheduler_type", "constant", "--save_steps", "3")
    assert done.codes == (0,), done.output
    assert "--learning_rate is now 0.5; it was 0.01" in done.output
    assert "save_steps is now" not in done.output
    rates = [row["train/learning_rate"] for row in half.metrics("faster") if "train/loss" in row]
    assert rates[:4] == [row["train/learning_rate"] for row in half.metrics("half") if "train/loss" in row][:4]
    assert rates[4:] == [0.5] * 4


def test_what_would_make_it_another_run_is_refused_unless_allowed(half: Any) -> None:
    refused = resumed(half, "bigger", "--global_batch_size", "6")
    assert refused.codes == (2,), refused.output
    assert "--global_batch_size differs from the run that is to be resumed" in refused.output
    assert "got:     6\n  allowed: 4" in refused.output
    assert "--allow_changed global_batch_size" in refused.output
    options = ("--global_batch_size", "6", "--allow_changed", "global_batch_size")
    allowed = half.run("bigger", "--resume", "auto", *options, ranks=1)
    assert allowed.codes == (0,), allowed.output
    shape = resumed(half, "wider", "--lora_r", "8", "--allow_changed", "lora_r")
    assert shape.codes == (2,), shape.output
    assert "--lora_r differs" in shape.output
    assert "another form" in shape.output


def test_other_data_is_refused_by_its_content_not_by_its_name(half: Any, data_files: tuple[Path, Path]) -> None:
    moved = half.folder / "moved.jsonl"
    shutil.copy(data_files[0], moved)
    same = resumed(half, "moved", "--train_files", str(moved))
    assert same.codes == (0,), same.output
    lines = moved.read_text().splitlines()
    moved.write_text("\n".join(lines[1:] + lines[:1]) + "\n")
    other = resumed(half, "other-data", "--train_files", str(moved))
    assert other.codes == (2,), other.output
    assert "the training data differs" in other.output
    assert "--allow_changed data_fingerprint" in other.output


def test_a_checkpoint_can_begin_a_run_in_another_folder(half: Any) -> None:
    source = half.folder / "half" / "checkpoints" / "step-2"
    done = half.run("branch", "--resume", str(source), ranks=1)
    assert done.codes == (0,), done.output
    assert [row["step"] for row in half.metrics("branch")] == [3, 4, 6, 8, 8]
    assert checkpoint.steps(half.folder / "half" / "checkpoints") == [2, 4]
    again = half.run("branch", "--resume", str(source), ranks=1)
    assert again.codes == (2,), again.output
    assert "the output folder holds another run" in again.output


def test_a_state_that_was_swapped_is_noticed_by_the_probe(half: Any) -> None:
    """Files that fit their manifest, but not the run: the one damage that no checksum can see."""
    name = "swapped"
    shutil.copytree(half.folder / "half", half.folder / name)
    folder = half.folder / name / "checkpoints" / "step-4"
    tensors = load_file(folder / "optimizer.safetensors")
    master = tensors["0.vectors.master"].clone()
    tensors["0.vectors.master"] = master.roll(1)
    save_file(tensors, folder / "optimizer.safetensors")
    checkpoint.write_manifest(folder, step=4)
    done = half.run(name, "--resume", "auto", ranks=1)
    assert done.codes == (2,), done.output
    assert "the resumed model is not the saved one" in done.output
    assert "equal: base model, training data, chat template" in done.output


def test_two_processes_never_share_a_folder(half: Any) -> None:
    with (half.folder / "half" / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = half.run("half", "--resume", "auto", ranks=1)
    assert done.codes == (2,), done.output
    assert "another process is training into this folder" in done.output
    assert checkpoint.steps(half.folder / "half" / "checkpoints") == [2, 4]


def test_a_used_folder_is_refused_without_resume(half: Any) -> None:
    done = half.run("half", ranks=1)
    assert done.codes == (2,), done.output
    assert "to go on with it: --resume auto" in done.output


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Rows of all offline runs in the order they were made, as wandb's own reader tells them; and their ids."""
    rows = []
    for path in sorted(folder.glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        records = [json.loads(line) for line in told.stdout.splitlines()]
        run_id = next(record["run"]["run_id"] for record in records if record["type"] == "run")
        rows += [{"run_id": run_id, **record["history"]["item"]} for record in records if record["type"] == "history"]
    return rows


def test_wandb_goes_on_with_the_same_run_and_no_step_twice(setting: Any) -> None:
    options = ("--tracker", "wandb", "--logging_steps", "1")
    stopped = setting.run("tracked", *options, ranks=1, fault="term@step:0:5")
    assert stopped.codes == (75,), stopped.output
    root = setting.folder / "tracked" / "checkpoints"
    stopped_at = checkpoint.steps(root)[-1]
    (root / f"step-{stopped_at}").rename(setting.folder / "lost")
    done = setting.run("tracked", *options, "--resume", "auto", ranks=1)
    assert done.codes == (0,), done.output
    assert "resumed from" in done.output
    rows = wandb_history(setting.folder / "tracked" / "wandb")
    assert len({row["run_id"] for row in rows}) == 1
    assert [int(row["step"]) for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in setting.metrics("tracked") if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    dropped = (setting.folder / "tracked" / "metrics.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == list(range(5, stopped_at + 1))
