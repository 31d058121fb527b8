"""Activations that go away and come back: the same bits, each tensor once, nothing left behind."""

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch

from anima.config.policy import parse_policy
from anima.config.schema import LoraConfig, ModelConfig, OptimizationConfig
from anima.errors import ConfigError
from anima.model import offload
from anima.model.base_model import load_base
from anima.model.compute import Compute, check_offload
from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters
from anima.model.offload import spread
from anima.model.packed import PackedModel
from anima.model.recompute import apply_policy


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", ("all", 0)),
        ("cheap/30", ("cheap", 30)),
        ("none/1", ("none", 1)),
        ("10", ("10", 0)),
        ("10/24", ("10", 24)),
    ],
)
def test_a_policy_names_what_is_recomputed_and_how_many_layers_go_away(policy: str, expected: tuple[str, int]) -> None:
    assert parse_policy(policy) == expected
    OptimizationConfig(recompute=policy)


@pytest.mark.parametrize("policy", ["all/3", "auto/3", "cheap/", "/3", "cheap/x", "-1", "cheap/-1", "most"])
def test_other_policies_are_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(policy)):
        parse_policy(policy)
    with pytest.raises(ConfigError, match="unknown policy"):
        OptimizationConfig(recompute=policy)


def test_without_a_gpu_nothing_can_go_away() -> None:
    cpu = Compute(torch.device("cpu"), torch.float32, "test")
    with pytest.raises(ConfigError, match="no GPU") as caught:
        check_offload(cpu, "cheap/30")
    assert caught.value.allowed == "cheap on a CPU"
    check_offload(cpu, "cheap")


def test_layers_are_spread_and_the_last_stays() -> None:
    assert spread(0, 8, 4) == [0, 2, 4, 6]
    assert spread(10, 60, 20)[:3] == [10, 12, 15]
    assert max(spread(0, 60, 59)) == 58
    assert spread(0, 3, 9) == [0, 1, 2]
    assert spread(4, 4, 2) == spread(0, 4, 0) == []


@pytest.mark.parametrize("policy", ["none", "cheap", "1"])
def test_gradients_have_the_same_bits(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    base = load_base(
        ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), torch.float32, "test")
    )
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=torch.float32, seed=3), policy).train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    row = (ids, torch.arange(40)[None], torch.tensor([0, 40], dtype=torch.int32), (40,))
    sent: list[weakref.ref[torch.Tensor]] = []
    original = offload.HostOffload._copy_out

    def counted(self: offload.HostOffload, flat: torch.Tensor, size: int) -> torch.Tensor:
        host = original(self, flat, size)
        sent.append(weakref.ref(host))
        return host

    monkeypatch.setattr(offload.HostOffload, "_copy_out", counted)
    results = []
    num_layers = len(base.get_decoder().layers)
    for count in (0, num_layers):
        apply_policy(network.causal_lm, f"{policy}/{count}")
        for _ in range(2):  # the second pass finds what the first one left
            network.zero_grad()
            network(*row).square().sum().backward()
        results.append([p.grad.clone() for p in trainable_parameters(network).values()])
    assert sent
    for plain, away in zip(*results, strict=True):
        assert torch.equal(plain, away)
    apply_policy(network.causal_lm, policy)
    gc.collect()
    assert not [host for host in sent if host() is not None]
    count = len(sent)
    network(*row).square().sum().backward()
    assert len(sent) == count


def test_too_much_for_the_host_is_out_of_memory(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(offload, "HOST_SHARE", 0.0)
    base = load_base(
        ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), torch.float32, "test")
    )
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=torch.float32, seed=3), "none").train()
    apply_policy(network.causal_lm, "none/1")
    row = (torch.ones(1, 8, dtype=torch.long), torch.arange(8)[None], torch.tensor([0, 8], dtype=torch.int32), (8,))
    with pytest.raises(torch.OutOfMemoryError, match="host memory"):
        network(*row)
    apply_policy(network.causal_lm, "none")
    network(*row).sum().backward()
