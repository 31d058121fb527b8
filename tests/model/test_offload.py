"""Activations that go away and come back: the same bits, each tensor once, nothing left behind."""

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from anima.config.policy import parse_policy
from anima.config.schema import LoraConfig, ModelConfig, OptimizationConfig
from anima.errors import ConfigError
from anima.model import host_memory, offload
from anima.model.base_model import load_base
from anima.model.compute import Compute, check_offload
from anima.model.host_memory import HostMemory
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
        ("all/28", ("all", 28)),
    ],
)
def test_a_policy_names_what_is_recomputed_and_how_many_layers_go_away(policy: str, expected: tuple[str, int]) -> None:
    assert parse_policy(policy) == expected
    OptimizationConfig(recompute=policy)


@pytest.mark.parametrize("policy", ["auto/3", "all/", "all/all", "cheap/", "/3", "cheap/x", "-1", "cheap/-1", "most"])
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


ROW = (
    torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0)),
    torch.arange(40)[None],
    torch.tensor([0, 40], dtype=torch.int32),
    (40,),
)


@pytest.fixture
def network(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> PackedModel:
    """Tiny, in train mode, every tensor large enough to go away, blocks smaller than most."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(host_memory, "SLAB_BYTES", 1 << 20)
    monkeypatch.setattr(host_memory, "BLOCK_BYTES", 1 << 12)
    base = load_base(
        ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), torch.float32, "test")
    )
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=torch.float32, seed=3), "all").train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.05)
    return network


def memory_of(network: PackedModel) -> HostMemory:
    found = network.causal_lm.get_decoder().anima_host_memory
    assert isinstance(found, HostMemory)
    return found


def gradients(network: PackedModel) -> list[torch.Tensor]:
    network.zero_grad()
    network(*ROW).square().sum().backward()
    found = [parameter.grad for parameter in trainable_parameters(network).values()]
    return [gradient.clone() for gradient in found if gradient is not None]


@pytest.mark.parametrize("policy", ["none", "cheap", "1", "all"])
def test_gradients_have_the_same_bits(network: PackedModel, policy: str) -> None:
    num_layers = len(network.causal_lm.get_decoder().layers)
    apply_policy(network.causal_lm, policy)
    plain = gradients(network)
    apply_policy(network.causal_lm, f"{policy}/{num_layers}")
    for _ in range(2):  # the second pass finds what the first one left
        for expected, found in zip(plain, gradients(network), strict=True):
            assert torch.equal(expected, found)


class Node:
    """Lives as long as the graph that it is hung on."""


@pytest.mark.parametrize("policy", ["none/2", "cheap/1", "1/2", "all/2"])
def test_the_graph_of_an_interrupted_pass_goes(network: PackedModel, policy: str) -> None:
    apply_policy(network.causal_lm, policy)
    nodes: list[weakref.ref[Node]] = []

    def hang(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if output.grad_fn is not None:
            output.grad_fn.metadata["node"] = node = Node()
            nodes.append(weakref.ref(node))

    for layer in network.causal_lm.get_decoder().layers:
        layer.mlp.register_forward_hook(hang)
    hidden = network(*ROW)
    assert len(nodes) == 2
    assert all(node() for node in nodes)
    del hidden  # as when a pass runs out of memory
    gc.collect()
    assert not any(node() for node in nodes)


@pytest.mark.parametrize(
    ("policy", "sent"),
    [
        ("all/1", {0: ["input"]}),
        ("all/2", {0: ["input"], 1: ["input"]}),
        ("1/1", {1: ["everything"]}),
        ("1/2", {0: ["input"], 1: ["everything"]}),
        ("1/9", {0: ["input"], 1: ["everything"]}),
    ],
)
def test_recomputed_layers_send_their_input_once_the_others_are_used_up(
    network: PackedModel, monkeypatch: pytest.MonkeyPatch, policy: str, sent: dict[int, list[str]]
) -> None:
    apply_policy(network.causal_lm, policy)
    written: dict[int, list[tuple[int, ...]]] = {}
    write = host_memory.Tape.write

    def watched(self: host_memory.Tape, values: torch.Tensor) -> list[torch.Tensor]:
        written.setdefault(id(self), []).append(tuple(values.shape))
        return write(self, values)

    monkeypatch.setattr(host_memory.Tape, "write", watched)
    network(*ROW)
    hidden = (1, 40, network.causal_lm.config.hidden_size)
    found = [["input"] if shapes == [hidden] else ["everything"] for shapes in written.values()]
    assert found == list(sent.values())
    assert all(len(shapes) > 5 for shapes, kind in zip(written.values(), found, strict=True) if kind == ["everything"])


def test_a_pass_takes_blocks_and_the_next_ones_take_no_more(network: PackedModel) -> None:
    apply_policy(network.causal_lm, "none/2")
    hidden = network(*ROW)
    memory = memory_of(network)
    used, held = memory.used_bytes, memory.held_bytes
    assert used > 40 * 64 * 4  # at least the input of a layer
    hidden.sum().backward()
    for _ in range(3):
        gradients(network)
    assert memory.held_bytes == held
    apply_policy(network.causal_lm, "cheap/1")
    assert memory_of(network) is memory, "a change of policy keeps what is pinned"
    assert memory.used_bytes == 0
    gradients(network)
    assert memory.held_bytes == held
    apply_policy(network.causal_lm, "none")
    assert memory.used_bytes == 0
    network(*ROW)
    assert memory.used_bytes == 0, "without a slash nothing goes away"


@pytest.mark.parametrize("policy", ["none/2", "cheap/1", "all/2"])
def test_an_interrupted_pass_gives_its_blocks_back(network: PackedModel, policy: str) -> None:
    apply_policy(network.causal_lm, policy)
    plain = gradients(network)
    memory = memory_of(network)
    held = memory.held_bytes

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("made up")

    last = network.causal_lm.get_decoder().layers[-1]
    handle = last.mlp.register_forward_hook(fail)
    for _ in range(20):  # without giving back, 20 passes would need more slabs
        with pytest.raises(torch.OutOfMemoryError, match="made up"):
            network(*ROW)
    handle.remove()
    for expected, found in zip(plain, gradients(network), strict=True):
        assert torch.equal(expected, found)
    assert memory.held_bytes == held


def test_an_interrupted_backward_pass_gives_its_blocks_back(network: PackedModel) -> None:
    apply_policy(network.causal_lm, "none/2")
    plain = gradients(network)
    memory = memory_of(network)
    held = memory.held_bytes

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("made up")

    for _ in range(20):
        hidden = network(*ROW)
        middle = trainable_parameters(network)
        handle = next(weight for name, weight in middle.items() if ".1.mlp.up_proj" in name).register_hook(fail)
        with pytest.raises(torch.OutOfMemoryError, match="made up"):
            hidden.square().sum().backward()
        handle.remove()
    for expected, found in zip(plain, gradients(network), strict=True):
        assert torch.equal(expected, found)
    assert memory.held_bytes == held


def test_a_pass_that_another_one_followed_cannot_be_differentiated(network: PackedModel) -> None:
    apply_policy(network.causal_lm, "none/1")
    first = network(*ROW)
    network(*ROW)
    with pytest.raises(RuntimeError, match="took its place"):
        first.sum().backward()


def test_too_much_for_the_host_is_out_of_memory(network: PackedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "HOST_SHARE", 0.0)
    apply_policy(network.causal_lm, "none/1")
    with pytest.raises(torch.OutOfMemoryError, match="host memory"):
        network(*ROW)
    apply_policy(network.causal_lm, "none")
    network(*ROW).sum().backward()
