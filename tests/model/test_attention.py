"""Packed attention against the plain definition, and no leak between documents."""

import pytest
import torch

from anima.data.shared_prompts import share
from anima.model import attention
from anima.model.attention import packed_attention
from anima.model.shared_keys import with_shared


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], window: int | None):
    """softmax(q k^T / sqrt(d) + mask) v over the whole row with one block-diagonal causal mask, float64."""
    heads, tokens, dim = query.shape[1:]
    repeat = heads // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1).double(), value.repeat_interleave(repeat, 1).double()
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.arange(tokens)
    allowed = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])
    if window is not None:
        allowed &= position[:, None] - position[None, :] < window
    scores = (query.double() @ key.transpose(-1, -2) / dim**0.5).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_equals_block_diagonal_causal_attention(key_heads: int, window: int | None) -> None:
    lengths = [5, 1, 9, 2]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 17, 8, generator=generator)
    key, value = (torch.randn(1, key_heads, 17, 8, generator=generator) for _ in range(2))
    boundaries = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    output, weights = packed_attention(
        torch.nn.Identity(),
        query,
        key,
        value,
        None,
        sliding_window=window,
        cu_seqlens=boundaries,
        document_lengths=lengths,
    )
    assert weights is None
    torch.testing.assert_close(output.double(), reference(query, key, value, lengths, window), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("key_heads", [4, 1])
def test_a_document_goes_on_from_the_one_before_it(key_heads: int, window: int | None) -> None:
    # 6 tokens, of which the next 3 see the first 4; 2 alone; 5, of which 1 sees 4: against 6, 7, 2, 5 and 5 whole ones.
    lengths, seen = [6, 3, 2, 5, 1], [0, 4, 0, 0, 4]
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, 17, 8, generator=generator) for heads in (4, key_heads, key_heads)]
    tensors = [state.clone().requires_grad_(True) for state in states]
    output, _ = packed_attention(
        torch.nn.Identity(),
        *tensors,
        None,
        sliding_window=window,
        cu_seqlens=torch.tensor([0, 6, 9, 11, 16, 17], dtype=torch.int32),
        document_lengths=lengths,
        shared_prompts=share(lengths, seen),
    )
    rows = [*range(6), *range(4), *range(6, 9), 9, 10, *range(11, 16), *range(11, 15), 16]
    own = [*range(6), *range(10, 13), 13, 14, *range(15, 20), 24]
    plain = [state.double().requires_grad_(True) for state in states]
    expected = reference(*(state[:, :, rows] for state in plain), [6, 7, 2, 5, 5], window)[:, own]
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(output.shape, generator=generator)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(tensors, plain, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)


def test_both_gradients_of_a_shared_key_are_added_and_rounded_once() -> None:
    shared = share([2, 1], [0, 1])
    assert shared is not None
    states = torch.zeros(1, 1, 3, 1, dtype=torch.bfloat16, requires_grad=True)
    gathered = with_shared(states, shared)
    assert gathered.shape == (1, 1, 4, 1)
    gathered.backward(torch.tensor([1.0, 2.0, 2**-8 + 2**-14, 4.0], dtype=torch.bfloat16).view(1, 1, 4, 1))
    assert states.grad is not None
    assert states.grad.flatten().tolist() == [1 + 2**-7, 2.0, 4.0]  # 1 + 2^-8 + 2^-14 lies above the middle


def test_a_mask_or_missing_boundaries_are_refused() -> None:
    states = torch.randn(1, 2, 3, 8)
    boundaries = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="boundaries"):
        packed_attention(torch.nn.Identity(), states, states, states, None)
    with pytest.raises(ValueError, match="mask"):
        packed_attention(
            torch.nn.Identity(),
            states,
            states,
            states,
            torch.ones(3, 3),
            cu_seqlens=boundaries,
            document_lengths=[3],
        )


@pytest.mark.parametrize(
    ("lengths", "window", "short"),
    [([5, 2048], None, True), ([5, 2049], None, False), ([5, 40], 39, False), ([5, 40], 40, True)],
)
def test_our_kernels_take_short_documents_without_an_effective_window(
    lengths: list[int], window: int | None, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = torch.zeros(1, 2, 3, 128)
    assert not attention.is_short(query, lengths, window)  # never on a CPU
    monkeypatch.setattr(attention, "serves_short", lambda device, head_dim: head_dim == 128)
    assert attention.is_short(query, lengths, window) == short
    assert not attention.is_short(query[..., :96], lengths, window)
