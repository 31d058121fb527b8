"""Packed attention against the plain definition, and no leak between documents."""

import pytest
import torch

from anima.model.attention import packed_attention


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
