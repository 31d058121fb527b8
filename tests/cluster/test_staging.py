"""Copies of the base: made once by many at a time, verified, made anew where they are damaged, refused without room."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from anima.cluster import staging
from anima.cluster.staging import local_base
from anima.config.schema import ModelConfig
from anima.errors import ConfigError, ModelError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder, as far as copying goes."""
    folder = tmp_path / "shared" / "base-33b"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "pytorch_model.bin").write_bytes(b"another format")
    (folder / "manifest.json").write_text("of its own")
    (folder / "original").mkdir()
    return folder


def config_of(base: Path, scratch: str) -> ModelConfig:
    return ModelConfig(model_name_or_path=str(base), base_staging_dir=scratch)


def stage(base: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    folder = local_base(config_of(base, str(tmp_path / "scratch")), said.append)
    assert folder is not None
    return folder, said


def age(folder: Path) -> None:
    """As if the copy had been verified long ago."""
    os.utime(folder.with_name(f"{folder.name}.verified"), (1, 1))


def test_the_copy_is_made_once_for_all_who_ask_at_the_same_time(base: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: stage(base, tmp_path), range(8)))
    assert len({folder for folder, _ in found}) == 1
    folder = found[0][0]
    assert sum("copied" in line for _, said in found for line in said) == 1
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "manifest.json"}
    assert (folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert stage(base, tmp_path) == (folder, [])


def test_nothing_is_copied_unless_asked_for(base: Path) -> None:
    assert local_base(ModelConfig(model_name_or_path=str(base)), print) is None
    random = ModelConfig(model_name_or_path=str(base), base_staging_dir="/nowhere", random_weights=True)
    assert local_base(random, print) is None


def test_an_old_copy_is_read_again_and_a_damaged_one_made_anew(base: Path, tmp_path: Path) -> None:
    folder, _ = stage(base, tmp_path)
    age(folder)
    assert "is whole" in stage(base, tmp_path)[1][0]
    flipped = bytearray((folder / "model.safetensors").read_bytes())
    flipped[1000] ^= 1
    (folder / "model.safetensors").write_bytes(flipped)
    age(folder)
    said = stage(base, tmp_path)[1]
    assert "made anew: model.safetensors has changed" in said[0]
    assert (folder / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_file_that_is_gone_is_seen_at_once(base: Path, tmp_path: Path) -> None:
    folder, _ = stage(base, tmp_path)
    (folder / "model.safetensors").unlink()  # a cleaner of temporary folders
    assert "made anew" in stage(base, tmp_path)[1][0]
    assert (folder / "model.safetensors").exists()


def test_a_changed_base_is_another_copy(base: Path, tmp_path: Path) -> None:
    first, _ = stage(base, tmp_path)
    (base / "model.safetensors").write_bytes(os.urandom(300_000))
    second, said = stage(base, tmp_path)
    assert second != first
    assert "copied" in said[0]


def test_what_a_killed_copy_left_is_not_taken(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(files: Any, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_copy", dies)
        with pytest.raises(KeyboardInterrupt):
            stage(base, tmp_path)
    folder, said = stage(base, tmp_path)
    assert "copied" in said[0]
    assert (folder / "model.safetensors").stat().st_size == 300_000


def test_what_a_copy_left_that_had_no_time_to_clean_up_goes(base: Path, tmp_path: Path) -> None:
    folder, _ = stage(base, tmp_path)
    shutil.rmtree(folder)
    leftover = folder.with_name(f".staging-{folder.name}-99999999")
    leftover.mkdir()
    other = folder.with_name(".staging-other-base-0123456789abcdef-99999999")  # perhaps being written
    other.mkdir()
    stage(base, tmp_path)
    assert not leftover.exists()
    assert other.exists()


def test_a_variable_that_is_not_set_makes_no_folder_of_that_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NODE_DISK", raising=False)
    with pytest.raises(ConfigError, match="NODE_DISK is not set"):
        local_base(config_of(base, "$NODE_DISK/x"), print)
    assert not list(tmp_path.glob("*NODE_DISK*"))
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    copy = local_base(config_of(base, "${NODE_DISK}/x"), print)
    assert copy is not None
    assert copy.parent == tmp_path / "disk" / "x"


def test_without_room_it_says_what_to_delete(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, _ = stage(base, tmp_path)
    (base / "config.json").write_text('{"changed": 1}')
    (tmp_path / "scratch" / "thesis").mkdir()  # not ours
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelError) as caught:
        stage(base, tmp_path)
    assert "no room" in str(caught.value)
    assert str(caught.value.fix) == f"rm -r {old}"


def test_a_folder_that_cannot_be_made_is_an_error_with_a_way_on(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError) as caught:
        local_base(config_of(base, str(tmp_path / "file" / "scratch")), print)
    assert "--base_staging_dir" in str(caught.value)
    assert "leave the option out" in str(caught.value)


def test_a_base_that_is_nowhere_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        local_base(config_of(Path("owner/nothing-of-that-name"), str(tmp_path)), print)
    assert "hf download owner/nothing-of-that-name" in str(caught.value)
