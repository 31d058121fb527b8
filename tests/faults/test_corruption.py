"""Damage to any file of a checkpoint is found before anything is loaded, and an older whole one is taken."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import BatchConfig, Config, DataConfig, ModelConfig, OutputConfig
from anima.errors import CheckpointError
from anima.train import checkpoint, resume

FLIPS = 300


@pytest.fixture(scope="module")
def saved(undisturbed: Any) -> Path:
    """The checkpoints of a finished run: steps 4, 6 and 8, of which 8 is the best as well."""
    root: Path = undisturbed.folder / "undisturbed" / "checkpoints"
    assert checkpoint.steps(root) == [4, 6, 8]
    return root


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """Checkpoints that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


def names_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    position = draw.randrange(len(content))
    content[position] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut_off(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def zero_page(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def config_of(output_dir: Path, resume_from: str) -> Config:
    return Config(
        model=ModelConfig(model_name_or_path="m"),
        data=DataConfig(train_files=("t",)),
        batch=BatchConfig(),
        output=OutputConfig(output_dir=str(output_dir)),
        resume=resume_from,
    )


@pytest.mark.parametrize("damage", [flip, cut_off, remove])
def test_damage_to_each_file_in_turn_makes_resume_walk_back(
    copy: Path, damage: Callable[[Path, random.Random], None]
) -> None:
    names = names_of(copy / "step-8")
    assert {"adapter_model.safetensors", "optimizer.safetensors", "ranks.safetensors", "manifest.json"} < set(names)
    for name in names:
        whole = (copy / "step-8" / name).read_bytes()
        damage(copy / "step-8" / name, random.Random(name))
        folder, passed_over = checkpoint.newest_whole(copy)
        assert folder == copy / "step-6", name
        assert [found.folder for found in passed_over] == [copy / "step-8"]
        assert name in passed_over[0].problems[0]
        (copy / "step-8" / name).write_bytes(whole)
    assert checkpoint.newest_whole(copy) == (copy / "step-8", [])


def test_a_foreign_file_and_a_garbled_pointer(copy: Path) -> None:
    (copy / "latest").write_text("/somewhere/else")
    (copy / "step-banana").mkdir()
    (copy / "step-99").write_text("a file")
    (copy / "step-8" / "foreign.bin").write_bytes(b"x")
    folder, passed_over = checkpoint.newest_whole(copy)
    assert folder == copy / "step-6"
    assert [found.problems[0].split(" ")[0] for found in passed_over] == ["manifest.json", "foreign.bin"]


def test_flips_and_truncations_never_pass(copy: Path) -> None:
    """Each of 300 seeded damages either is found, or leaves a manifest that says the same."""
    folder, draw = copy / "step-8", random.Random(7)
    files = [folder / name for name in names_of(folder)]
    said = checkpoint.read_manifest(folder)
    harmless = 0
    for number in range(FLIPS):
        path = draw.choice([*files, folder / "manifest.json", folder / "trainer_state.json"])
        whole = path.read_bytes()
        draw.choice([flip, flip, flip, cut_off, zero_page])(path, draw)
        if path.read_bytes() != whole and not checkpoint.problems(folder):
            assert path.name == "manifest.json", (number, path)
            assert checkpoint.read_manifest(folder) == said, number
            harmless += 1
        path.write_bytes(whole)
    assert harmless < FLIPS / 10  # flips of one blank into another are possible, nothing more
    assert checkpoint.problems(folder) == []


def test_choosing_sets_aside_what_the_run_turns_back_from(copy: Path) -> None:
    flip(copy / "step-8" / "optimizer.safetensors", random.Random(1))
    origin, notices = resume.choose(config_of(copy.parent, "auto"))
    assert origin is not None
    assert (origin.folder, origin.step, origin.continues) == (copy / "step-6", 6, True)
    assert notices[0].startswith("passed over step-8: optimizer.safetensors has changed")
    assert checkpoint.steps(copy) == [4, 6]
    assert (copy / "aside-step-8").is_dir()


def test_a_named_checkpoint_must_be_whole_and_none_means_a_fresh_start(copy: Path, tmp_path: Path) -> None:
    flip(copy / "step-4" / "ranks.safetensors", random.Random(1))
    with pytest.raises(CheckpointError, match="not whole") as caught:
        resume.choose(config_of(copy.parent, str(copy / "step-4")))
    assert "ranks.safetensors has changed" in str(caught.value)
    branch, _ = resume.choose(config_of(tmp_path / "other", str(copy / "step-6")))
    assert branch is not None
    assert not branch.continues
    assert checkpoint.steps(copy) == [4, 6, 8]
    for step in (4, 6, 8):
        (copy / f"step-{step}" / "manifest.json").write_text("{}")
    origin, notices = resume.choose(config_of(copy.parent, "auto"))
    assert origin is None
    assert "this is a fresh start" in notices[-1]
    assert checkpoint.steps(copy) == []


def test_the_command_shows_and_prunes_the_same(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    source = Path(__file__).resolve().parents[2] / "launch" / "checkpoint.py"
    spec = importlib.util.spec_from_file_location("launch_checkpoint", source)
    assert spec is not None
    assert spec.loader is not None
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    command.main(["list", str(copy.parent)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "--resume auto takes this" in lines[2]
    command.main(["verify", str(copy / "step-6")])
    printed = capsys.readouterr().out
    assert "whole" in printed
    assert "--resume auto" not in printed  # step-8 is newer
    with pytest.raises(CheckpointError, match="one checkpoint alone"):  # the others are whole, though nobody looked
        command.main(["prune", str(copy / "step-6"), "--keep", "2"])
    assert checkpoint.steps(copy) == [4, 6, 8]
    cut_off(copy / "step-8" / "trainer_state.json", random.Random(3))
    with pytest.raises(CheckpointError, match="1 of 3"):
        command.main(["verify", str(copy)])
    assert "NOT WHOLE: trainer_state.json has" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="nothing is deleted"):
        command.main(["prune", str(copy)])
    shutil.rmtree(copy / "step-8")
    command.main(["prune", str(copy), "--keep", "1"])
    assert checkpoint.steps(copy) == [4, 6] or checkpoint.steps(copy) == [6]
    best = json.loads((copy / "step-6" / "manifest.json").read_text())["score"]
    assert best is None
