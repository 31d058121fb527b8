"""Look after the checkpoints of a run: which are whole, which one --resume auto would take, and make room.

python launch/checkpoint.py list runs/quickstart
python launch/checkpoint.py verify runs/quickstart/checkpoints/step-20
python launch/checkpoint.py prune runs/quickstart --keep 1
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.config.paths import expanded
from anima.entry import run_command
from anima.errors import CheckpointError
from anima.train import checkpoint, run_folder


def main(argv: Sequence[str]) -> None:
    """Read the command line and do what the word says."""
    parser = argparse.ArgumentParser(description="List, verify or prune the checkpoints of a run.")
    parser.add_argument("word", choices=("list", "verify", "prune"))
    parser.add_argument("folder", type=expanded, help="a run's folder, its checkpoints/ folder, or one checkpoint")
    parser.add_argument("--keep", type=int, default=1, help="prune: newest checkpoints to keep beside the best one")
    options = parser.parse_args(argv)
    folders = find(options.folder)
    if options.word == "prune" and folders == [options.folder]:
        fix = f"python launch/checkpoint.py prune {options.folder.parent} --keep {options.keep}"
        raise CheckpointError("one checkpoint alone is not pruned", where=options.folder, fix=fix)
    whole = show(folders)
    if options.word == "verify" and len(whole) < len(folders):
        raise CheckpointError(
            f"{len(folders) - len(whole)} of {len(folders)} checkpoints are not whole",
            where=options.folder,
            fix="--resume auto passes them over; prune does not count them",
        )
    if options.word == "prune":
        prune(folders[0].parent, options.keep, whole)


def find(folder: Path) -> list[Path]:
    """The checkpoints that `folder` means, oldest first."""
    if folder.name.startswith(checkpoint.PREFIX):
        found = [folder] if folder.is_dir() else []
    else:
        inner = folder / run_folder.CHECKPOINTS
        root = inner if inner.is_dir() else folder
        found = [root / f"{checkpoint.PREFIX}{step}" for step in checkpoint.steps(root)]
    if not found:
        raise CheckpointError(
            "there is no checkpoint",
            where=folder,
            allowed="a run's folder, its checkpoints/ folder, or one checkpoint such as step-200",
            fix="a run writes them with --save_steps N",
        )
    return found


def show(folders: Sequence[Path]) -> list[Path]:
    """A line a checkpoint, after reading every byte; returns those that are whole."""
    problems = {folder: checkpoint.problems(folder) for folder in folders}
    whole = [folder for folder in folders if not problems[folder]]
    root = folders[0].parent
    best = checkpoint.best_step(root)
    all_shown = len(folders) == len(checkpoint.steps(root))
    for folder in folders:
        notes = [f"{checkpoint.folder_bytes(folder) / 2**20:10.1f} MiB"]
        if folder in whole:
            score = checkpoint.read_manifest(folder)["score"]
            notes.append("whole" + ("" if score is None else f", held-out loss {score:.4f}"))
            notes += ["the best"] * (folder.name == f"{checkpoint.PREFIX}{best}")
            notes += ["--resume auto takes this"] * (all_shown and folder == whole[-1])
        else:
            notes.append("NOT WHOLE: " + "; ".join(problems[folder]))
        print(f"{folder}  {', '.join(notes)}")
    return whole


def prune(root: Path, keep: int, whole: Sequence[Path]) -> None:
    """Delete older checkpoints, once those that stay are known to be whole, and what was set aside."""
    if keep < 1:
        raise CheckpointError("keep at least one", where="--keep", got=keep, allowed="1 or more")
    newest = checkpoint.steps(root)[-keep:]
    damaged = [step for step in newest if root / f"{checkpoint.PREFIX}{step}" not in whole]
    if damaged:
        raise CheckpointError(
            "a checkpoint that would stay is not whole, so nothing is deleted",
            where=root,
            got=", ".join(f"{checkpoint.PREFIX}{step}" for step in damaged),
            fix="delete that folder, or --keep more",
        )
    for step in checkpoint.prune(root, keep):
        print(f"deleted {root / checkpoint.PREFIX}{step}")
    for folder in checkpoint.remove_aside(root):
        print(f"deleted {folder}")


if __name__ == "__main__":
    run_command(main)
