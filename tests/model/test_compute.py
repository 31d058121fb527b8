"""What choosing a GPU leaves behind; the choice itself is seen in tests/launch and tests/gpu."""

import os

import pytest
import torch

from anima.errors import ConfigError
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


@pytest.mark.parametrize(
    ("capability", "nf4", "asked", "label"),
    [
        ((9, 0), True, "auto", "fp8_backward"),
        ((9, 0), False, "auto", "bf16"),
        ((9, 0), True, "bf16", "bf16"),
        ((9, 0), True, "fp8", "fp8"),
        ((8, 9), True, "auto", "bf16"),
        ((8, 9), True, "fp8_backward", "fp8_backward"),
        ((8, 0), True, "auto", "bf16"),
        ((10, 0), True, "auto", "bf16"),
        ((7, 5), True, "auto", "fp32"),
    ],
)
@pytest.mark.usefixtures("made_up_gpu")
def test_auto_is_fp8_backward_only_where_that_was_measured(
    capability: tuple[int, int], nf4: bool, asked: str, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    compute = choose_compute("cuda", asked, 0, trains_nf4=nf4)
    assert compute.label == label
    assert compute.is_bf16 == (label != "fp32")


@pytest.mark.usefixtures("made_up_gpu")
@pytest.mark.parametrize("form", ["fp8", "fp8_backward"])
def test_fp8_is_refused_where_the_gpu_has_none(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    with pytest.raises(ConfigError, match="no fp8 units"):
        choose_compute("cuda", form, 0, trains_nf4=True)
