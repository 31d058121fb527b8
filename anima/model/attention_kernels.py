"""Causal attention within the short documents of a packed row, forward and backward, as Triton kernels.

FlashAttention-2's algorithm (Dao 2023) for documents of some hundred tokens, where its own backward spends its time on
atomic additions in fp32 and on clearing and converting them. Here one program makes each result: no atomics, always the
same bits. Imported only where it runs (a GPU, or Triton's interpreter). Knows neither windows nor shared prompts.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """How a kernel is cut."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """At most, a thread; None for as many as the compiler likes."""
    heads_first: bool = False
    """Neighbouring programs are heads of the same tokens; else blocks of the same head."""


FORWARD = Tiles(64, 32, 4, 3, 168)
QUERY_GRADIENT = Tiles(64, 32, 4, 2, 168, heads_first=True)
KEY_GRADIENTS = Tiles(32, 64, 4, 3)
"""The fastest of a dozen each on an H200, for heads of 128 in documents of 200 tokens; none spills registers."""


@triton.jit
def _program(cu_seqlens, num_documents, BLOCK: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """Head, beginning and length of the document, and the block's first token in it, which may lie behind the end.

    Document d has the slots from cu_seqlens[d] // BLOCK + d on: as many as it has blocks or one more, without a table
    and without knowing the lengths on the host.
    """
    slot = tl.program_id(1 if HEADS_FIRST else 0)
    head = tl.program_id(0 if HEADS_FIRST else 1).to(tl.int64)
    document, last = slot * 0, slot * 0 + num_documents - 1
    while document < last:
        middle = (document + last + 1) // 2
        reached = tl.load(cu_seqlens + middle) // BLOCK + middle <= slot
        document = tl.where(reached, middle, document)
        last = tl.where(reached, last, middle - 1)
    begin = tl.load(cu_seqlens + document)
    length = tl.load(cu_seqlens + document + 1) - begin
    return head, begin.to(tl.int64), length, (slot - begin // BLOCK - document) * BLOCK


@triton.jit
def _rows(states, first, length, STRIDE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(BLOCK, HEAD_DIM) from token `first` of a document on, zero behind its end."""
    token = tl.arange(0, BLOCK)
    states += tl.cast(first, tl.int64) * STRIDE
    place = token[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(states + place, mask=(first + token < length)[:, None], other=0.0)


@triton.jit
def _store_rows(states, rows, first, length, STRIDE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write what lies before the document's end."""
    token = tl.arange(0, BLOCK)
    states += tl.cast(first, tl.int64) * STRIDE
    place = token[:, None] * STRIDE + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(states + place, rows.to(states.dtype.element_ty), mask=(first + token < length)[:, None])


@triton.jit(do_not_specialize=["num_tokens", "num_documents"])
def _forward(
    query, key, value, output, log2_sums, cu_seqlens,
    query_head, key_head, value_head,
    num_tokens, num_documents, log2_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head."""
    head, begin, length, first = _program(cu_seqlens, num_documents, QUERIES, HEADS_FIRST)
    if first >= length:
        return
    key += begin * KEY_STRIDE + head // GROUP * key_head
    value += begin * VALUE_STRIDE + head // GROUP * value_head
    q = _rows(query + begin * QUERY_STRIDE + head * query_head, first, length, QUERY_STRIDE, QUERIES, HEAD_DIM)
    token = first + tl.arange(0, QUERIES)
    total = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    for first_key in range(0, tl.minimum(first + QUERIES, length), KEYS):
        k = _rows(key, first_key, length, KEY_STRIDE, KEYS, HEAD_DIM)
        sees = token[:, None] >= (first_key + tl.arange(0, KEYS))[None, :]
        scores = tl.where(sees, tl.dot(q, tl.trans(k)), float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1) * log2_scale)
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(scores * log2_scale - larger[:, None])
        v = _rows(value, first_key, length, VALUE_STRIDE, KEYS, HEAD_DIM)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None])
        sums = sums * shrink + tl.sum(p, 1)
        largest = larger
    output += (begin * HEADS + head) * HEAD_DIM
    _store_rows(output, total / sums[:, None], first, length, HEADS * HEAD_DIM, QUERIES, HEAD_DIM)
    tl.store(log2_sums + head * num_tokens + begin + token, largest + tl.log2(sums), mask=token < length)


@triton.jit(do_not_specialize=["num_tokens", "num_documents"])
def _query_gradient(
    query, key, value, output, gradient, of_query, log2_sums, deltas, cu_seqlens,
    query_head, key_head, value_head, gradient_head,
    num_tokens, num_documents, scale, log2_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GRADIENT_STRIDE: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head; its deltas, sums of output * gradient, are left for `_key_gradients`."""
    head, begin, length, first = _program(cu_seqlens, num_documents, QUERIES, HEADS_FIRST)
    if first >= length:
        return
    key += begin * KEY_STRIDE + head // GROUP * key_head
    value += begin * VALUE_STRIDE + head // GROUP * value_head
    q = _rows(query + begin * QUERY_STRIDE + head * query_head, first, length, QUERY_STRIDE, QUERIES, HEAD_DIM)
    gradient += begin * GRADIENT_STRIDE + head * gradient_head
    do = _rows(gradient, first, length, GRADIENT_STRIDE, QUERIES, HEAD_DIM)
    ours = (begin * HEADS + head) * HEAD_DIM
    o = _rows(output + ours, first, length, HEADS * HEAD_DIM, QUERIES, HEAD_DIM)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    token = first + tl.arange(0, QUERIES)
    statistics = head * num_tokens + begin + token
    tl.store(deltas + statistics, delta, mask=token < length)
    log2_sum = tl.load(log2_sums + statistics, mask=token < length, other=0.0)
    dq = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    for first_key in range(0, tl.minimum(first + QUERIES, length), KEYS):
        k = _rows(key, first_key, length, KEY_STRIDE, KEYS, HEAD_DIM)
        v = _rows(value, first_key, length, VALUE_STRIDE, KEYS, HEAD_DIM)
        p = tl.exp2(tl.dot(q, tl.trans(k)) * log2_scale - log2_sum[:, None])
        p = tl.where(token[:, None] >= (first_key + tl.arange(0, KEYS))[None, :], p, 0.0)
        ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    _store_rows(of_query + ours, dq * scale, first, length, HEADS * HEAD_DIM, QUERIES, HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "num_documents"])
def _key_gradients(
    query, key, value, gradient, of_key, of_value, log2_sums, deltas, cu_seqlens,
    query_head, key_head, value_head, gradient_head,
    num_tokens, num_documents, scale, log2_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HEADS_FIRST: tl.constexpr,
    QUERY_STRIDE: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, GRADIENT_STRIDE: tl.constexpr,
):  # fmt: skip
    """One block of keys of one head, over all heads of queries that see it; scores are (KEYS, QUERIES) here."""
    head, begin, length, first = _program(cu_seqlens, num_documents, KEYS, HEADS_FIRST)
    if first >= length:
        return
    k = _rows(key + begin * KEY_STRIDE + head * key_head, first, length, KEY_STRIDE, KEYS, HEAD_DIM)
    v = _rows(value + begin * VALUE_STRIDE + head * value_head, first, length, VALUE_STRIDE, KEYS, HEAD_DIM)
    query += begin * QUERY_STRIDE
    gradient += begin * GRADIENT_STRIDE
    log2_sums += begin
    deltas += begin
    dk = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    dv = tl.zeros((KEYS, HEAD_DIM), tl.float32)
    blocks = tl.cdiv(length - first, QUERIES)
    for step in range(GROUP * blocks):
        member, block = (head, step) if GROUP == 1 else (head * GROUP + step // blocks, step % blocks)
        first_query = first + block * QUERIES
        q = _rows(query + member * query_head, first_query, length, QUERY_STRIDE, QUERIES, HEAD_DIM)
        do = _rows(gradient + member * gradient_head, first_query, length, GRADIENT_STRIDE, QUERIES, HEAD_DIM)
        token = first_query + tl.arange(0, QUERIES)
        statistics = member * num_tokens + token
        log2_sum = tl.load(log2_sums + statistics, mask=token < length, other=0.0)
        delta = tl.load(deltas + statistics, mask=token < length, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * log2_scale - log2_sum[None, :])
        p = tl.where(token[None, :] >= (first + tl.arange(0, KEYS))[:, None], p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (tl.dot(v, tl.trans(do)) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    ours = (begin * KEY_HEADS + head) * HEAD_DIM
    _store_rows(of_key + ours, dk * scale, first, length, KEY_HEADS * HEAD_DIM, KEYS, HEAD_DIM)
    _store_rows(of_value + ours, dv, first, length, KEY_HEADS * HEAD_DIM, KEYS, HEAD_DIM)


def short_attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Causal attention within each document, softmax(scale q k^T) v; differentiable, and never waits for the device.

    Args:
        query: (T, heads, head_dim), bf16 or fp16, of any strides but the last, which is 1; head_dim a power of two.
        key: (T, key_heads, head_dim), each for heads / key_heads neighbouring heads of queries.
        value: As key.
        cu_seqlens: int32 (documents + 1,), cumulative document lengths on the device, from 0 to T.
        scale: Factor of the scores, positive.

    Returns:
        (T, heads, head_dim), without gaps, as the gradients are.
    """
    return _ShortAttention.apply(query, key, value, cu_seqlens, scale)  # type: ignore[no-any-return, no-untyped-call]


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:  # noqa: ANN401
        output, log2_sums = attend(query, key, value, cu_seqlens, scale)
        ctx.save_for_backward(query, key, value, cu_seqlens, output, log2_sums)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradient = gradient if gradient.stride(2) == 1 else gradient.contiguous()
        return *gradients(gradient, ctx.saved_tensors, ctx.scale), None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float, tiles: Tiles = FORWARD
) -> tuple[Tensor, Tensor]:
    """As `short_attention`; also the binary logarithm of every softmax's sum of exponentials, fp32 (heads, T)."""
    num_tokens, heads, head_dim = query.shape
    output = torch.empty((num_tokens, heads, head_dim), dtype=query.dtype, device=query.device)
    log2_sums = torch.empty((heads, num_tokens), dtype=torch.float32, device=query.device)
    _forward[_grid(cu_seqlens, num_tokens, heads, tiles.queries, tiles)](
        query, key, value, output, log2_sums, cu_seqlens,
        query.stride(1), key.stride(1), value.stride(1), num_tokens, len(cu_seqlens) - 1, scale * math.log2(math.e),
        **_constants(query, key, value, tiles),
    )  # fmt: skip
    return output, log2_sums


def gradients(
    gradient: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    scale: float,
    query_tiles: Tiles = QUERY_GRADIENT,
    key_tiles: Tiles = KEY_GRADIENTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query, key and value from the output's; saved: query, key, value, cu_seqlens and what `attend` gave."""
    query, key, value, cu_seqlens, output, log2_sums = saved
    num_tokens, heads, _ = query.shape
    of_query, of_key, of_value = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    deltas = torch.empty_like(log2_sums)
    numbers = (
        *(tensor.stride(1) for tensor in (query, key, value, gradient)),
        *(num_tokens, len(cu_seqlens) - 1, scale, scale * math.log2(math.e)),
    )
    _query_gradient[_grid(cu_seqlens, num_tokens, heads, query_tiles.queries, query_tiles)](
        query, key, value, output, gradient, of_query, log2_sums, deltas, cu_seqlens,
        *numbers, **_constants(query, key, value, query_tiles),
        GRADIENT_STRIDE=gradient.stride(0),
    )  # fmt: skip
    _key_gradients[_grid(cu_seqlens, num_tokens, key.shape[1], key_tiles.keys, key_tiles)](
        query, key, value, gradient, of_key, of_value, log2_sums, deltas, cu_seqlens,
        *numbers, **_constants(query, key, value, key_tiles), GRADIENT_STRIDE=gradient.stride(0),
    )  # fmt: skip
    return of_query, of_key, of_value


def _grid(cu_seqlens: Tensor, num_tokens: int, heads: int, block: int, tiles: Tiles) -> tuple[int, int]:
    """As many slots as `_program` says, times heads."""
    slots = num_tokens // block + len(cu_seqlens) - 1
    return (heads, slots) if tiles.heads_first else (slots, heads)


def _constants(query: Tensor, key: Tensor, value: Tensor, tiles: Tiles) -> dict[str, int | None]:
    """Strides between tokens among them: a network has the same ones always, and addresses then need few registers."""
    return {
        "HEADS": query.shape[1],
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_DIM": query.shape[2],
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "HEADS_FIRST": tiles.heads_first,
        "QUERY_STRIDE": query.stride(0),
        "KEY_STRIDE": key.stride(0),
        "VALUE_STRIDE": value.stride(0),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "maxnreg": tiles.registers,
    }
