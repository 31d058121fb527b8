"""Attention over short documents: its kernels (in Triton's interpreter) against the plain definition in float64, and
worked by hand; no leak between documents, and the same bits every time."""

import pytest
from interpreter import run_in_interpreter

SHARED = """
import builtins
import math
import torch
from anima.model import attention_kernels as kernels
from anima.model.attention_kernels import Tiles, attend, gradients, short_attention

# The interpreter of Triton 3.6 has scalars of shape (1,), which NumPy 2.4 no longer takes for a loop's bounds.
kernels.range = lambda *bounds: builtins.range(
    *(int(bound.handle.data.item()) if hasattr(bound, "handle") else int(bound) for bound in bounds)
)


def borders(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def inputs(lengths, heads, key_heads, head_dim, heads_outside=False):
    # Query, key, value and the output's gradient, (T, heads, head_dim), the last by way of (heads, T, head_dim).
    generator = torch.Generator().manual_seed(len(lengths) * heads + head_dim)
    states = []
    for count in (heads, key_heads, key_heads, heads):
        if heads_outside:
            states.append(torch.randn(count, sum(lengths), head_dim, generator=generator).transpose(0, 1))
        else:
            states.append(torch.randn(sum(lengths), count, head_dim, generator=generator))
    return states


def reference(query, key, value, lengths, scale):
    # Each document alone, in float64: its output and the binary logarithm of every softmax's sum, (heads, T).
    outputs, sums = [], []
    repeat = query.shape[1] // key.shape[1]
    for q, k, v in zip(*(states.double().split(lengths) for states in (query, key, value))):
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1) / math.log(2))
    return torch.cat(outputs), torch.cat(sums, 1)


def check(lengths, heads, key_heads, head_dim, scale=None, heads_outside=False, tiles=None):
    scale = scale or head_dim**-0.5
    *states, target = inputs(lengths, heads, key_heads, head_dim, heads_outside)
    wide = [tensor.double().requires_grad_() for tensor in states]
    expected, expected_sums = reference(*wide, lengths, scale)
    expected.backward(target.double())
    output, sums = attend(*states, borders(lengths), scale, *(tiles or ())[:1])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-5, atol=1e-5)
    got = gradients(target, (*states, borders(lengths), output, sums), scale, *(tiles or ())[1:])
    assert output.is_contiguous()
    for gradient, leaf in zip(got, wide):
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=2e-5)
"""

CHECKS = {
    "documents of all sorts": "check([64, 65, 1, 200], 1, 1, 64); check([1], 2, 2, 64); check([31, 32, 33], 1, 1, 128)",
    "grouped heads": "check([70, 3, 40], 6, 2, 64); check([33], 4, 1, 128, heads_outside=True)",
    "strides": "check([40, 90], 3, 3, 64, heads_outside=True)",
    "scale": "check([40, 7], 1, 1, 64, scale=0.3)",
    "many documents": "check([1, 2, 3, 1, 1, 5, 70, 1, 4, 0, 2], 2, 1, 16)",
    "other tiles": """
for i, sizes in enumerate(((16, 64), (64, 16), (32, 32), (128, 64), (64, 128))):
    tiles = Tiles(*sizes, 4, 2, heads_first=i % 2 == 0)
    check([130, 1, 40], 2, 1, 16, tiles=[tiles] * 3)
""",
    "scores beyond exp's range": """
lengths = [50, 9]
*states, target = (100 * tensor for tensor in inputs(lengths, 1, 1, 64))
expected, sums = reference(*states, lengths, 1.0)
got = attend(*states, borders(lengths), 1.0)
torch.testing.assert_close(got[0].double(), expected, rtol=1e-5, atol=1e-3)
torch.testing.assert_close(got[1].double(), sums, rtol=1e-5, atol=1e-2)
""",
    "worked by hand": """
# Scores ln 3 and 0 of the second token: weights 3/4 and 1/4, output 3/4 x 8 + 1/4 x 4 = 7. Its gradient 1 gives
# the values 3/4 and 1/4, the scores 3/4 (8 - 7) = 3/4 and 1/4 (4 - 7) = -3/4.
query, key, value = (torch.zeros(2, 1, 16) for _ in range(3))
query[1, 0, 0], key[0, 0, 0], value[0, 0, 0], value[1, 0, 0] = 1, 2 * math.log(3), 8, 4
leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
output = short_attention(*leaves, borders([2]), 0.5)
torch.testing.assert_close(output[:, 0, 0], torch.tensor([8.0, 7.0]))
output[1, 0, 0].backward()
torch.testing.assert_close(value.grad[:, 0, 0], torch.tensor([0.75, 0.25]))
torch.testing.assert_close(key.grad[:, 0, 0], 0.5 * torch.tensor([0.75, -0.75]))
torch.testing.assert_close(query.grad[:, 0, 0], torch.tensor([0, 0.5 * 0.75 * 2 * math.log(3)]))
""",
    "a document does not see its neighbours, and the bits are always the same": """
lengths = [40, 70, 33]


def results(change):
    *states, target = inputs(lengths, 2, 1, 64)
    for tensor in (*states, target):
        tensor[40:110] = change(tensor[40:110])
    leaves = [tensor.requires_grad_() for tensor in states]
    output = short_attention(*leaves, borders(lengths), 0.125)
    output.backward(target)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


plain = results(lambda part: part)
for change in (lambda part: part, lambda part: 1e3 * part, lambda part: part * float("nan")):
    for got, expected in zip(results(change), plain):
        for document in (slice(0, 40), slice(110, 143)):
            assert torch.equal(got[document], expected[document])
for got, expected in zip(results(lambda part: part), plain):
    assert torch.equal(got, expected)
alone = inputs(lengths, 2, 1, 64)[:3]
first = short_attention(*(tensor[:40] for tensor in alone), borders([40]), 0.125)
assert torch.equal(first, plain[0][:40])
""",
    "a gradient of any strides, and recomputing": """
from torch.utils.checkpoint import checkpoint

lengths = [40, 9]
*states, target = inputs(lengths, 2, 2, 16)
for spread in (target.transpose(0, 1).contiguous().transpose(0, 1), target[..., :1].expand(-1, -1, 16)):
    found = []
    for again in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in states]
        arguments = (*leaves, borders(lengths), 0.25)
        output = checkpoint(short_attention, *arguments, use_reentrant=False) if again else short_attention(*arguments)
        output.backward(spread)
        found.append([leaf.grad for leaf in leaves])
    wide = [tensor.double().requires_grad_() for tensor in states]
    reference(*wide, lengths, 0.25)[0].backward(spread.double())
    for got, same, leaf in zip(*found, wide):
        assert torch.equal(got, same)
        torch.testing.assert_close(got.double(), leaf.grad, rtol=1e-5, atol=1e-5)
saved = short_attention(*arguments).grad_fn.saved_tensors
assert [tuple(tensor.shape) for tensor in saved] == [(49, 2, 16)] * 3 + [(3,), (49, 2, 16), (2, 49)]
""",
}


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter(name: str) -> None:
    run_in_interpreter(f'{SHARED}\n{CHECKS[name]}\nprint("kernels agree")')
