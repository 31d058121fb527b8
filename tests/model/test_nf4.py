"""NF4 matrices read back: whatever their sides, the error is NF4's own."""

import pytest
import torch

from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.model.nf4 import quantize


@pytest.mark.parametrize("shape", [(64, 128), (80, 144), (7, 48), (64, 80), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_back_is_what_was_packed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.05
    found = quantize(weight)
    codes = torch.stack([found.packed.view(-1) >> 4, found.packed.view(-1) & 15], dim=1).flatten().long()
    state = found.state
    group = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: state.absmax.numel()]
    absmax = state.state2.code[state.absmax.long()] * group + state.offset
    by_hand = (state.code[codes] * absmax.repeat_interleave(64)[: codes.numel()]).view(shape)
    dense = found.dense(dtype)
    assert dense.dtype == dtype
    torch.testing.assert_close(dense.float(), by_hand, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-7)
    if weight.numel() > 64:
        assert float((dense - weight).norm() / weight.norm()) < 0.11


def test_a_side_that_the_cpu_kernel_cannot_take_is_refused(tmp_path: object) -> None:
    from transformers import LlamaConfig

    from anima.model.base_model import load_base
    from anima.model.compute import choose_compute

    folder = str(tmp_path)
    LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    compute = choose_compute("cpu", "fp32", 0)
    with pytest.raises(ModelError, match="wrongly on a CPU") as caught:
        load_base(ModelConfig(model_name_or_path=folder, random_weights=True), compute)
    assert caught.value.got == "96 inputs"
    load_base(ModelConfig(model_name_or_path=folder, random_weights=True, quantization="none"), compute)
