"""Triton kernels that read NF4: the packed codes and their doubly quantised scales to bf16 or e4m3, in one pass.

Imported only where they run (a GPU, or Triton's interpreter in tests). The arithmetic is bitsandbytes' own, rounding by
rounding, so that a base has the same bits whoever reads it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILES = {False: (8, 1024, 4), True: (128, 64, 4)}
"""Rows, columns and warps of a tile of `_unpack`, by whether the result is transposed."""
_TABLE_TILES = {False: (4, 512, 2), True: (64, 256, 4)}
"""The same of `_unpack_by_table`."""
_TABLE_BLOCKSIZE = 64
"""Weights that share a scale, and so a table, in `_unpack_by_table`."""


@triton.jit
def _scales(block, inside, sources, NESTED: tl.constexpr, SCALED: tl.constexpr, GROUPSIZE: tl.constexpr):
    """What the codes of these blocks are multiplied by."""
    absmax, scale_codes, group_scales, offset, inverse_scale = sources
    if NESTED:
        code = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        group = tl.load(group_scales + block // GROUPSIZE, mask=inside, other=0.0)
        scale = tl.load(scale_codes + code) * group + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    if SCALED:
        scale = scale * tl.load(inverse_scale)
    return scale


@triton.jit
def _unpack(
    words,
    absmax,
    scale_codes,
    group_scales,
    offset,
    inverse_scale,
    codes,
    output,
    num_rows,
    num_columns,
    output_stride,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPSIZE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
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
    sources = (absmax, scale_codes, group_scales, offset, inverse_scale)
    scale = _scales(place // (BLOCKSIZE // 8), inside, sources, NESTED, SCALED, GROUPSIZE)
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


@triton.jit
def _choose_bytes(low, high, selector, EMULATED: tl.constexpr):
    """PTX's prmt: byte i of the result is that of `low` (0 to 3) or `high` (4 to 7) which nibble i of `selector` names;
    a nibble of 8 or more gives eight times the sign of the byte instead."""
    if EMULATED:  # for the interpreter, which knows no assembly
        both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        chosen = both & 0
        for i in tl.static_range(4):
            nibble = (selector >> (4 * i)) & 15
            byte = (both >> ((nibble & 7) * 8)) & 255
            chosen |= tl.where(nibble < 8, byte, (byte >> 7) * 255) << (8 * i)
        return chosen.to(tl.int32)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _four_bytes(codes, scale, FIRST: tl.constexpr, EMULATED: tl.constexpr):
    """Codes FIRST to FIRST + 3 times `scale` in e4m3, as one word."""
    a, b = tl.load(codes + FIRST) * scale, tl.load(codes + FIRST + 1) * scale
    c, d = tl.load(codes + FIRST + 2) * scale, tl.load(codes + FIRST + 3) * scale
    if EMULATED:
        a, b = a.to(tl.float8e4nv).to(tl.uint8, bitcast=True), b.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        c, d = c.to(tl.float8e4nv).to(tl.uint8, bitcast=True), d.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return a.to(tl.int32) | (b.to(tl.int32) << 8) | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 x, y; cvt.rn.satfinite.e4m3x2.f32 x, $2, $1; cvt.rn.satfinite.e4m3x2.f32 y, $4, $3; "
            "mov.b32 $0, {x, y}; }",
            "=r,r,r,r,r",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _look_up(
    row,
    block,
    inside,
    words,
    codes,
    num_blocks,
    sources,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPSIZE: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Blocks of some rows in e4m3, (rows, blocks, 8 words, 2): four bytes each, in the order of the nibbles, where the
    second weight of every two is first."""
    place = row.to(tl.int64)[:, None] * num_blocks + block[None, :]
    word = tl.load(words + (place[:, :, None] * 8 + tl.arange(0, 8)), mask=inside[:, :, None], other=0)
    scale = _scales(place, inside, sources, NESTED, SCALED, GROUPSIZE)[:, :, None, None]
    # The lower three bits of a nibble choose a byte from either half of the table, the fourth chooses the half.
    within, half = word & 0x77777777, ((word >> 1) & 0x44444444) | 0x32103210
    within, half = tl.join(within, within >> 16), tl.join(half, half >> 16)
    below = _choose_bytes(
        _four_bytes(codes, scale, 0, EMULATED), _four_bytes(codes, scale, 4, EMULATED), within, EMULATED
    )
    above = _choose_bytes(
        _four_bytes(codes, scale, 8, EMULATED), _four_bytes(codes, scale, 12, EMULATED), within, EMULATED
    )
    return _choose_bytes(below, above, half, EMULATED)


@triton.jit
def _unpack_by_table(
    words,
    absmax,
    scale_codes,
    group_scales,
    offset,
    inverse_scale,
    codes,
    output,
    num_rows,
    num_columns,
    output_stride,
    NESTED: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPSIZE: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """One tile of ROWS x COLUMNS weights in e4m3, four a word of `output`, whose stride is in bytes.

    Only 16 different values occur in a block. They are made once for all words of a thread, and looked up four at a
    time: six instructions a weight with everything, where `_unpack` takes fourteen and is bound by them.
    """
    num_blocks = num_columns // BLOCKSIZE
    block = tl.program_id(1) * (COLUMNS // BLOCKSIZE) + tl.arange(0, COLUMNS // BLOCKSIZE)
    sources = (absmax, scale_codes, group_scales, offset, inverse_scale)
    if TRANSPOSED:
        four = tl.program_id(0) * (ROWS // 4) + tl.arange(0, ROWS // 4)
        inside = (four < num_rows // 4)[:, None] & (block < num_blocks)[None, :]
        given = (block, inside, words, codes, num_blocks, sources)
        a = _look_up(4 * four, *given, NESTED, SCALED, GROUPSIZE, EMULATED)
        b = _look_up(4 * four + 1, *given, NESTED, SCALED, GROUPSIZE, EMULATED)
        c = _look_up(4 * four + 2, *given, NESTED, SCALED, GROUPSIZE, EMULATED)
        d = _look_up(4 * four + 3, *given, NESTED, SCALED, GROUPSIZE, EMULATED)
        ab = tl.join(_choose_bytes(a, b, 0x5140, EMULATED), _choose_bytes(a, b, 0x7362, EMULATED))
        cd = tl.join(_choose_bytes(c, d, 0x5140, EMULATED), _choose_bytes(c, d, 0x7362, EMULATED))
        columns = tl.join(_choose_bytes(ab, cd, 0x7632, EMULATED), _choose_bytes(ab, cd, 0x5410, EMULATED))
        values = tl.trans(tl.reshape(columns, (ROWS // 4, COLUMNS)))
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        target = output + column.to(tl.int64)[:, None] * (output_stride // 4) + four[None, :]
        tl.store(target, values, mask=(column < num_columns)[:, None] & (four < num_rows // 4)[None, :])
    else:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (block < num_blocks)[None, :]
        given = (block, inside, words, codes, num_blocks, sources)
        a = _look_up(row, *given, NESTED, SCALED, GROUPSIZE, EMULATED)
        values = tl.reshape(_choose_bytes(a, a, 0x2301, EMULATED), (ROWS, COLUMNS // 4))
        four = tl.program_id(1) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        target = output + row.to(tl.int64)[:, None] * (output_stride // 4) + four[None, :]
        tl.store(target, values, mask=(row < num_rows)[:, None] & (four < num_columns // 4)[None, :])


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
    by_table: bool = True,
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
        by_table: Look e4m3 up in the tables of blocks where shape and output allow; the bits are the same.
        tile: Rows, columns, warps of a tile; None for the fastest.
    """
    num_rows, num_columns = shape
    if output is None:
        output = torch.empty(shape[::-1] if transposed else shape, dtype=dtype, device=packed.device)
    by_table = by_table and _has_tables(num_columns, blocksize, output)
    rows, columns, warps = tile or (_TABLE_TILES if by_table else _TILES)[transposed]
    scale_codes, group_scales, offset = nested or (codes, codes, codes)
    given = (
        packed.view(-1).view(torch.int32),
        absmax,
        scale_codes,
        group_scales,
        offset,
        codes if inverse_scale is None else inverse_scale,
        codes,
        output.view(torch.int32) if by_table else output,
        *(num_rows, num_columns, output.stride(0)),
        *(nested is not None, inverse_scale is not None, groupsize, blocksize, transposed, rows, columns),
    )
    grid = (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, columns))
    # Without fusion: bitsandbytes rounds between product and sum.
    if by_table:
        _unpack_by_table[grid](*given, EMULATED=not packed.is_cuda, num_warps=warps, enable_fp_fusion=False)
    else:
        _unpack[grid](*given, num_warps=warps, enable_fp_fusion=False)
    return output


def _has_tables(num_columns: int, blocksize: int, output: Tensor) -> bool:
    """Whether `_unpack_by_table` can write here: e4m3, rows of whole blocks, and places of whole words."""
    whole_words = all(n % 4 == 0 for n in (output.shape[1], output.stride(0), output.data_ptr()))
    of_size = blocksize == _TABLE_BLOCKSIZE and num_columns % blocksize == 0
    return output.dtype == torch.float8_e4m3fn and of_size and whole_words
