"""Our modules in place of transformers' own: the same hidden states in every family, packed and with a cache."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from anima.config.schema import ModelConfig
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.kernels import RmsNorm, RotaryAttention, SwiGlu
from anima.model.packed import generating, packed_hidden

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
