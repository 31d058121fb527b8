"""Our kernels of attention over short documents on a GPU: against fp32, and no worse than flash attention."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def lengths_of(tokens: int) -> list[int]:
    """Of documents like those of instructions, and of 1, 64 and 65 tokens."""
    rng = random.Random(0)
    lengths = [1, 64, 65]
    while sum(lengths) < tokens:
        lengths.append(max(20, min(1024, round(rng.lognormvariate(5.2, 0.7)))))
    return lengths


def results(function, states: list[Tensor], target: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [state.detach().requires_grad_() for state in states]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, target.to(output.dtype))]


def in_fp32(lengths: list[int], scale: float):
    """Every document alone."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        documents = zip(
            *(states.float().transpose(0, 1).split(lengths, 1) for states in (query, key, value)), strict=True
        )
        outputs = [F.scaled_dot_product_attention(*d, is_causal=True, scale=scale, enable_gqa=True) for d in documents]
        return torch.cat(outputs, 1).transpose(0, 1)

    return attention


def by_flash(cu_seqlens: Tensor, longest: int, scale: float):
    """With keys and values repeated, as torch 2.11 needs it."""
    from torch.nn.attention.varlen import varlen_attn

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(repeat, 1) for states in (key, value))
        return varlen_attn(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(-1, 0)
        )

    return attention


@pytest.mark.parametrize("heads_outside", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(52, 52, 128), (64, 8, 128), (8, 2, 64), (12, 1, 128)])
def test_errors_are_no_larger_than_those_of_flash_attention(
    heads: int, key_heads: int, head_dim: int, heads_outside: bool
) -> None:
    from anima.model.attention_kernels import short_attention

    torch.manual_seed(0)
    lengths = lengths_of(4000)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    counts = (heads, key_heads, key_heads, heads)
    states = [torch.randn(sum(lengths), count, head_dim, device="cuda").bfloat16() for count in counts]
    if heads_outside:
        states = [state.transpose(0, 1).contiguous().transpose(0, 1) for state in states]
    *states, target = states
    scale = 0.7 * head_dim**-0.5
    exact = results(in_fp32(lengths, scale), [state.float() for state in states], target.float())
    flash = results(by_flash(cu_seqlens, max(lengths), scale), states, target)
    ours, again = (results(lambda *qkv: short_attention(*qkv, cu_seqlens, scale), states, target) for _ in range(2))
    for got, same, theirs, expected in zip(ours, again, flash, exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous()
        assert torch.equal(got, same)
        wide = expected.double()
        error, allowed = ((found.double() - wide).norm() / wide.norm() for found in (got, theirs))
        assert error < min(1.2 * allowed, 1e-2), (float(error), float(allowed))
        for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):  # a small one would hide
            part = slice(begin, end)
            bound = 2e-2 * wide[part].norm() + 1e-2  # of a single token, queries and keys have a gradient of zero
            assert (got[part].double() - wide[part]).norm() < bound


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from anima.model import attention, attention_kernels

    if torch.cuda.get_device_capability() != attention.SHORT_COMPUTE_CAPABILITY:
        pytest.skip("our kernels were not measured on this GPU")
    device, right = torch.device("cuda", 0), attention_kernels.gradients
    attention.serves_short.cache_clear()
    assert attention.serves_short(device, 128)
    assert attention.serves_short(device, 64)
    monkeypatch.setattr(attention_kernels, "gradients", lambda *given: [1.1 * found for found in right(*given)])
    attention.serves_short.cache_clear()
    assert not attention.serves_short(device, 128)
    attention.serves_short.cache_clear()
