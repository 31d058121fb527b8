"""Triton kernel that reads NF4: the packed codes and their doubly quantised scales to bf16 or e4m3, in one pass.

Imported only where it runs (a GPU, or Triton's interpreter in the tests). The arithmetic is bitsandbytes' own, rounding
by rounding, so that a base has the same bits whoever reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = {False: (8, 1024, 4), True: (128, 64, 4)}
"""Rows, columns and warps of a tile, by whether the result is transposed."""


@triton.jit
def _unpack(
    words,
    absmax,
    scale_codes,
    group_scales,
    offset,
    codes,
    inverse_scale,
    output,
    num_rows,
    num_columns,
    output_stride,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUPSIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One tile of ROWS x COLUMNS weights; the first of a byte's two is in its high nibble (bitsandbytes)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    word = tl.program_id(1) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
    inside = (row < num_rows)[:, None] & (word < num_columns // 8)[None, :]
    place = row.to(tl.int64)[:, None] * (num_columns // 8) + word[None, :]
    packed = tl.load(words + place, mask=inside, other=0)
    block = place // (BLOCKSIZE // 8)
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        group = tl.load(group_scales + block // GROUPSIZE, mask=inside, other=0.0)
        scale = tl.load(scale_codes + code) * group + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    if SCALED:
        scale = scale * tl.load(inverse_scale)
    shift = (tl.arange(0, 8) ^ 1) * 4
    nibble = (packed[:, :, None] >> shift[None, None, :]) & 15
    value = tl.load(codes + nibble) * scale[:, :, None]
    values = tl.reshape(value.to(output.dtype.element_ty), (ROWS, COLUMNS))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if TRANSPOSED:
        target = output + column.to(tl.int64)[:, None] * output_stride + row[None, :]
        tl.store(target, tl.trans(values), mask=(column < num_columns)[:, None] & (row < num_rows)[None, :])
    else:
        target = output + row.to(tl.int64)[:, None] * output_stride + column[None, :]
        tl.store(target, values, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :])


def unpack(
    packed: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor, Tensor, Tensor] | None,
    codes: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    *,
    blocksize: int,
    groupsize: int,
    inverse_scale: Tensor | None = None,
    transposed: bool = False,
    output: Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
) -> Tensor:
    """NF4 weights of (out, in), times `inverse_scale` where it is given.

    Args:
        packed: uint8, two weights a byte.
        absmax: Scales of blocks, fp32; where nested, their uint8 codes.
        nested: (values of the codes, scales of groups of blocks, offset), fp32, or None.
        codes: The 16 NF4 values, fp32.
        shape: (out, in); in must be a multiple of 8, the weights of the word that a thread reads.
        dtype: Of the result: bf16, fp32 or e4m3.
        blocksize: Weights of a block.
        groupsize: Blocks of a group.
        inverse_scale: fp32 scalar on the device.
        transposed: Give (in, out) instead.
        output: Where to write, rows without gaps; a new tensor if None.
        tile: Rows, columns, warps of a tile; None for what was fastest on an H100.
    """
    num_rows, num_columns = shape
    rows, columns, warps = tile or _TILES[transposed]
    if output is None:
        output = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=packed.device)
    scale_codes, group_scales, offset = nested or (codes, codes, codes)
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns))
    _unpack[grid](
        packed.view(-1).view(torch.int32),
        absmax,
        scale_codes,
        group_scales,
        offset,
        codes,
        codes if inverse_scale is None else inverse_scale,
        output,
        num_rows,
        num_columns,
        output.stride(0),
        NESTED=nested is not None,
        SCALED=inverse_scale is not None,
        BLOCKSIZE=blocksize,
        GROUPSIZE=groupsize,
        TRANSPOSED=transposed,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
        enable_fp_fusion=False,  # bitsandbytes rounds between product and sum
    )
    return output
