"""What choosing a GPU leaves behind; the choice itself is seen in tests/launch and tests/gpu."""

import os

import pytest
import torch

from anima.model.compute import choose_compute


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "made up")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))


@pytest.mark.usefixtures("made_up_gpu")
@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_segments_grow_unless_the_user_has_set_the_allocator_up(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:512")
    else:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is taken back behind this test
        monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert choose_compute("auto", "bf16", 0).device == torch.device("cuda", 0)
    there = {name: os.environ[name] for name in names if name in os.environ}
    assert there == {
        own or "PYTORCH_ALLOC_CONF": "expandable_segments:True" if own is None else "max_split_size_mb:512"
    }


@pytest.mark.usefixtures("made_up_gpu")
def test_a_cpu_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    choose_compute("cpu", "auto", 0)
    assert "PYTORCH_ALLOC_CONF" not in os.environ
