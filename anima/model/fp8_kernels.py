"""The fp8 products on a GPU, and their Triton kernels: rows to e4m3, and scales, bias and LoRA's update onto a product.

Imported only where it runs (a GPU, or Triton's interpreter in the tests); `anima.model.fp8` holds the same arithmetic
in torch, which is its reference and what a CPU computes.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima.model import cublaslt

CHUNK, CHUNK_WARPS = 4096, 16
"""Columns that a program holds at a time, 8 a thread, and its warps: two or three rows at a time on a multiprocessor of
an H100, few enough that what is read again is still in its cache."""


@triton.jit
def scale_of(largest):
    """The scale of a row from the magnitude of its largest value."""
    return tl.maximum(largest, 1e-12) / 448.0


@triton.jit
def _quantize_row(values, output, scales, num_columns, COLUMNS: tl.constexpr):
    """One row over its largest magnitude."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    value = tl.load(values + row * num_columns + column, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(value)))
    tl.store(output + row * num_columns + column, (value / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as e4m3 and the scale of every row, fp32 (rows, 1)."""
    num_rows, num_columns = values.shape
    output = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=values.device)
    _quantize_row[(num_rows,)](
        values, output, scales, num_columns, COLUMNS=triton.next_power_of_2(num_columns), num_warps=8
    )
    return output, scales


@triton.jit
def largest_of(values, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """Magnitudes of a row of WIDTH, the largest of every column of its chunks, (CHUNK,)."""
    largest = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        value = tl.load(values + column, mask=column < WIDTH, other=0.0)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
    return largest


@triton.jit
def write_e4m3(values, output, scale, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """A row of WIDTH over its scale."""
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        value = tl.load(values + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        tl.store(output + column, (value / scale).to(tl.float8e4nv), mask=column < WIDTH)


@triton.jit
def _quantize_side_by_side(
    first,
    second,
    third,
    output,
    scales,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One row of up to three matrices; read twice, the second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    first += row * FIRST
    second += row * SECOND
    third += row * THIRD
    output += row * (FIRST + SECOND + THIRD)
    largest = tl.maximum(largest_of(first, FIRST, CHUNK), largest_of(second, SECOND, CHUNK))
    scale = scale_of(tl.max(tl.maximum(largest, largest_of(third, THIRD, CHUNK))))
    tl.store(scales + row, scale)
    write_e4m3(first, output, scale, FIRST, CHUNK)
    write_e4m3(second, output + FIRST, scale, SECOND, CHUNK)
    write_e4m3(third, output + (FIRST + SECOND), scale, THIRD, CHUNK)


def quantize_side_by_side(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One to three matrices of (rows, columns_i), each without gaps, as one of e4m3, (rows, sum of columns), and one
    scale a row over all of them, fp32 (rows, 1).
    """
    num_rows, widths = parts[0].shape[0], [part.shape[1] for part in parts]
    assert 1 <= len(parts) <= 3
    assert all(part.is_contiguous() for part in parts)
    output = torch.empty((num_rows, sum(widths)), dtype=torch.float8_e4m3fn, device=parts[0].device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=parts[0].device)
    absent = 3 - len(parts)
    _quantize_side_by_side[(num_rows,)](
        *parts, *[parts[0]] * absent, output, scales, *widths, *[0] * absent, CHUNK=CHUNK, num_warps=CHUNK_WARPS
    )
    return output, scales


@triton.jit
def _finish(
    raw,
    row_scales,
    column_scales,
    bias,
    left,
    right,
    output,
    scaling,
    num_rows,
    num_columns,
    left_stride,
    right_stride,
    NUM_RANKS: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """One tile of ROWS x COLUMNS; `right` holds one row an output."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    update = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, NUM_RANKS, RANKS):
        rank = first + tl.arange(0, RANKS)
        lefts = tl.load(
            left + row.to(tl.int64)[:, None] * left_stride + rank[None, :],
            mask=(row < num_rows)[:, None] & (rank < NUM_RANKS)[None, :],
            other=0.0,
        )
        rights = tl.load(
            right + column[:, None] * right_stride + rank[None, :],
            mask=(column < num_columns)[:, None] & (rank < NUM_RANKS)[None, :],
            other=0.0,
        )
        update = tl.dot(lefts, tl.trans(rights), update)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = row.to(tl.int64)[:, None] * num_columns + column[None, :]
    value = tl.load(raw + place, mask=inside, other=0.0)
    value = value * tl.load(row_scales + row, mask=row < num_rows, other=0.0)[:, None]
    value = value * tl.load(column_scales + column, mask=column < num_columns, other=0.0)[None, :] + scaling * update
    if BIASED:
        value += tl.load(bias + column, mask=column < num_columns, other=0.0).to(tl.float32)[None, :]
    tl.store(output + place, value.to(output.dtype.element_ty), mask=inside)


def product(
    rows: tuple[Tensor, Tensor],
    weight: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor, float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """`fp8.product` on a GPU: where the library can add to a product, it adds to bias and update, which are rounded
    before; elsewhere our kernel adds them to a product in fp32.

    Args:
        rows: e4m3 (tokens, in) and fp32 (tokens, 1).
        weight: e4m3 (out, in).
        column_scales: fp32 (1, out).
        bias: (out,) or None.
        update: As for `finish_product`.
        dtype: Of the result, (tokens, out).
    """
    values, row_scales = rows
    if dtype == torch.bfloat16 and cublaslt.serves(values.device):
        output = _update(update, bias, (values.shape[0], weight.shape[0]), values.device)
        cublaslt.add_product(output, values, row_scales, weight, column_scales)
        return output
    one = _one(values.device)
    raw: Tensor = torch._scaled_mm(
        values, weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
    )
    return finish_product(raw, row_scales, column_scales, bias, update, dtype)


@functools.cache
def _one(device: torch.device) -> Tensor:
    """The scale of products that are scaled later; made once, not in every product."""
    return torch.ones((), device=device)


def _update(
    update: tuple[Tensor, Tensor, float] | None, bias: Tensor | None, shape: tuple[int, int], device: torch.device
) -> Tensor:
    """Update and bias alone, bf16."""
    if update is None:
        nothing = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        return nothing if bias is None else nothing.add_(bias)
    left, right, scaling = update
    below = left.new_empty(1) if bias is None else bias.to(left.dtype)  # with beta = 0 it is not read
    return torch.addmm(below, left, right, beta=0 if bias is None else 1, alpha=scaling)


def finish_product(
    raw_TO: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor, float] | None,
    dtype: torch.dtype,
    tile: tuple[int, int, int] = (64, 128, 4),
) -> Tensor:
    """`fp8.finished_by_torch`, rounded once to `dtype`.

    Args:
        raw_TO: Product of e4m3 values, fp32.
        row_scales: fp32 (tokens, 1).
        column_scales: fp32 (1, out).
        bias: (out,) or None.
        update: left, (tokens, r), rows without gaps; right, (r, out), columns without gaps: a transposed B; scaling.
        dtype: Of the result.
        tile: Rows, columns, warps of a tile; the fastest on an H100.

    Returns:
        (tokens, out).
    """
    num_rows, num_columns = raw_TO.shape
    left_TR, right_OR, scaling, num_ranks = raw_TO, raw_TO, 0.0, 0  # not read
    if update is not None:
        left_TR, right_OR, scaling = update[0], update[1].T, update[2]
        num_ranks = left_TR.shape[1]
        assert left_TR.stride(1) == right_OR.stride(1) == 1
    output = torch.empty((num_rows, num_columns), dtype=dtype, device=raw_TO.device)
    rows, columns, warps = tile
    _finish[triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns)](
        raw_TO,
        row_scales,
        column_scales,
        raw_TO if bias is None else bias,
        left_TR,
        right_OR,
        output,
        scaling,
        num_rows,
        num_columns,
        left_TR.stride(0),
        right_OR.stride(0),
        NUM_RANKS=num_ranks,
        BIASED=bias is not None,
        ROWS=rows,
        COLUMNS=columns,
        RANKS=min(64, max(16, triton.next_power_of_2(num_ranks))),
        num_warps=warps,
    )
    return output
