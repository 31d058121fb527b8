"""Our modules in place of transformers' own: the same hidden states in every family, packed and with a cache; long rows
in pieces."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anima.config.schema import LoraConfig, ModelConfig
from anima.model import kernels
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.kernels import RmsNorm, RotaryAttention, SwiGlu, silu_product
from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters
from anima.model.packed import PackedModel, generating, packed_hidden

SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 5},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_answers_equal_stock_transformers(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in stock.parameters():  # norms of ones and biases of zeros would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    stock.save_pretrained(tmp_path)
    ours = load_base(
        ModelConfig(model_name_or_path=str(tmp_path), quantization="none"),
        Compute(torch.device("cpu"), torch.float32, "test"),
    )
    kinds = [type(module) for module in ours.modules()]
    assert kinds.count(RotaryAttention) == kinds.count(SwiGlu) == 3
    assert kinds.count(RmsNorm) == 7
    lengths = (11, 4)
    ids = torch.randint(0, 128, (1, 15), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    boundaries = torch.tensor([0, 11, 15], dtype=torch.int32)
    hidden = packed_hidden(ours, ids, positions, boundaries, lengths)
    with torch.no_grad():
        expected = [stock.model(part).last_hidden_state[0] for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(hidden, torch.cat(expected), rtol=1e-4, atol=1e-4)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with generating(ours), torch.no_grad():
        answer = ours.generate(ids[:, :11], attention_mask=torch.ones(1, 11, dtype=torch.long), **asked)
    wanted = stock.generate(ids[:, :11], attention_mask=torch.ones(1, 11, dtype=torch.long), **asked)
    assert answer.tolist() == wanted.tolist()


@pytest.mark.parametrize("policy", ["none", "cheap", "all", "all/1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_in_pieces_give_the_same_hidden_states_and_gradients(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, policy: str, dtype: torch.dtype
) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), dtype, "test"))
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=dtype, seed=3), policy).train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    row = (ids, torch.arange(40)[None], torch.tensor([0, 40], dtype=torch.int32), (40,))
    wanted = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    tokens: list[int] = []

    def watched(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        tokens.append(gate.shape[-2])
        return silu_product(gate, up)

    monkeypatch.setattr(kernels, "silu_product", watched)

    def outcome() -> list[torch.Tensor]:
        tokens.clear()
        network.zero_grad()
        hidden = network(*row)
        (hidden * wanted).sum().backward()
        found = [parameter.grad for parameter in trainable_parameters(network).values()]
        return [hidden.detach(), *(gradient.clone() for gradient in found if gradient is not None)]

    whole = outcome()
    assert set(tokens) == {40}
    monkeypatch.setattr(kernels, "LONG_PRODUCT", 128 * 39)  # intermediate size x tokens: 40 are too many
    monkeypatch.setattr(kernels, "PIECE_PRODUCT", 128 * 13 + 127)
    pieces = outcome()
    assert set(tokens) == {13, 1}, "three pieces of 13 and the one that is left"
    assert len(pieces) == len(whole)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    for expected, found in zip(whole, pieces, strict=True):
        assert found.dtype == expected.dtype
        difference, size = (found - expected).float().norm().item(), expected.float().norm().item()
        assert difference <= near * size
    assert pieces[-1].dtype == torch.float32, "gradients of pieces add up in fp32"
    monkeypatch.setattr(kernels, "LONG_PRODUCT", 128 * 40)
    outcome()
    assert set(tokens) == {40}


def test_dropout_is_the_same_when_a_piece_is_recomputed(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(
        ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), torch.float32, "test")
    )
    lora = LoraConfig(lora_r=4, lora_dropout=0.5)
    network = PackedModel(attach_lora(base, lora, dtype=torch.float32, seed=3), "none").train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(kernels, "LONG_PRODUCT", 1)
    monkeypatch.setattr(kernels, "PIECE_PRODUCT", 128 * 13)
    row = (torch.arange(3, 33)[None], torch.arange(30)[None], torch.tensor([0, 30], dtype=torch.int32), (30,))
    block = base.get_decoder().layers[0].mlp
    weight = next(p for name, p in block.named_parameters() if "down_proj.lora_A" in name)
    generator = torch.Generator().manual_seed(1)
    direction, wanted = torch.randn(weight.shape, generator=generator), torch.randn(30, 64, generator=generator)

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(7)
        weight.data += step * direction
        total: torch.Tensor = (network(*row) * wanted).sum()
        weight.data -= step * direction
        return total

    loss(0.0).backward()
    assert weight.grad is not None
    slope = (loss(1e-2) - loss(-1e-2)).item() / 2e-2  # the mask of the forward pass counts in both
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-2)
