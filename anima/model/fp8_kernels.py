"""Triton kernels of the fp8 products: NF4 nibbles to e4m3 in one pass, and rows of activations to e4m3.

Imported only where they run (a GPU, or Triton's interpreter in the tests); `anima.model.fp8` holds the same arithmetic
in torch, which is their reference and what a CPU computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 128


@triton.jit
def _unpack(
    packed,
    absmax,
    scale_codes,
    group_scales,
    offset,
    codes,
    inverse_scale,
    output,
    num_rows,
    num_columns,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUPSIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of ROWS x COLUMNS weights; the first of a byte's two is in its high nibble (bitsandbytes)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (row < num_rows)[:, None] & (pair < num_columns // 2)[None, :]
    place = row.to(tl.int64)[:, None] * (num_columns // 2) + pair[None, :]
    byte = tl.load(packed + place, mask=inside, other=0).to(tl.int32)
    block = place // (BLOCKSIZE // 2)
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        group = tl.load(group_scales + block // GROUPSIZE, mask=inside, other=0.0)
        scale = tl.load(scale_codes + code) * group + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    scale = scale * tl.load(inverse_scale)
    first = tl.load(codes + (byte >> 4)) * scale
    second = tl.load(codes + (byte & 15)) * scale
    values = tl.interleave(first, second).to(tl.float8e4nv)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        target = output + column.to(tl.int64)[:, None] * num_rows + row[None, :]
        tl.store(target, tl.trans(values), mask=(column < num_columns)[:, None] & (row < num_rows)[None, :])
    else:
        target = output + row.to(tl.int64)[:, None] * num_columns + column[None, :]
        tl.store(target, values, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])


@triton.jit
def _quantize_row(values, output, scales, num_columns, COLUMNS: tl.constexpr):
    """One row over its largest magnitude."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    value = tl.load(values + row * num_columns + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(value)), 1e-12) / 448.0
    tl.store(output + row * num_columns + column, (value / scale).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def unpack(
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    codes: Tensor,
    inverse_scale: Tensor,
    shape: tuple[int, int],
    *,
    blocksize: int,
    groupsize: int,
    transposed: bool,
) -> Tensor:
    """NF4 weights of (out, in) as e4m3, times `inverse_scale`.

    Args:
        packed: uint8, two weights a byte.
        absmax: Scales of blocks, fp32; where nested, their uint8 codes.
        nested: (values of the codes, scales of groups of blocks, offset), fp32, or None.
        codes: The 16 NF4 values, fp32.
        inverse_scale: fp32 scalar on the device.
        shape: (out, in); in must be even.
        blocksize: Weights of a block.
        groupsize: Blocks of a group.
        transposed: Give (in, out) instead.
    """
    num_rows, num_columns = shape
    output = torch.empty(shape[::-1] if transposed else shape, dtype=torch.float8_e4m3fn, device=packed.device)
    scale_codes, group_scales, offset = nested or (codes, codes, codes)
    grid = (triton.cdiv(num_rows, _BLOCK_ROWS), triton.cdiv(num_columns, _BLOCK_COLUMNS))
    _unpack[grid](
        packed,
        absmax,
        scale_codes,
        group_scales,
        offset,
        codes,
        inverse_scale,
        output,
        num_rows,
        num_columns,
        NESTED=nested is not None,
        BLOCKSIZE=blocksize,
        GROUPSIZE=groupsize,
        TRANSPOSED=transposed,
        ROWS=_BLOCK_ROWS,
        COLUMNS=_BLOCK_COLUMNS,
        num_warps=4,
    )
    return output


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as e4m3 and the scale of every row, fp32 (rows, 1)."""
    num_rows, num_columns = values.shape
    output = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=values.device)
    _quantize_row[(num_rows,)](
        values, output, scales, num_columns, COLUMNS=triton.next_power_of_2(num_columns), num_warps=8
    )
    return output, scales
