"""Triton kernels that make values and hand them on in e4m3 as well: RMSNorm, and the SwiGLU product both ways.

Imported only where it runs (a GPU, or Triton's interpreter in the tests). The e4m3 values are made from those that are
written, after rounding, so they are the bits that `fp8_kernels` makes of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from anima.model.fp8_kernels import CHUNK, CHUNK_WARPS, scale_of, write_e4m3


@triton.jit
def _norm(
    x,
    weight,
    output,
    e4m3,
    scales,
    inverse_norms,
    epsilon,
    num_columns,
    WITH_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row, rounded before and after the weight as Llama's norm is."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    given = tl.load(x + row * num_columns + column, mask=inside, other=0.0)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wide = given.to(tl.float32)
    inverse_norm = tl.rsqrt(tl.sum(wide * wide) / num_columns + epsilon)
    tl.store(inverse_norms + row, inverse_norm)
    value = ((wide * inverse_norm).to(given.dtype).to(tl.float32) * factor).to(given.dtype)
    tl.store(output + row * num_columns + column, value, mask=inside)
    if WITH_ROWS:
        rounded = value.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(rounded)))
        tl.store(e4m3 + row * num_columns + column, (rounded / scale).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, with_rows: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """RMSNorm over the last axis.

    Args:
        x: (rows, columns) without gaps.
        weight: (columns,).
        epsilon: Onto the mean of the squares.
        with_rows: Give the output in e4m3, too.

    Returns:
        The output; 1 / the norm of every row, fp32 (rows,); the output in e4m3 and the scale of every row.
    """
    num_rows, num_columns = x.shape
    output = torch.empty_like(x)
    inverse_norms = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rows = _empty_rows(num_rows, num_columns, x.device) if with_rows else None
    _norm[(num_rows,)](
        x,
        weight,
        output,
        *(rows or (output, inverse_norms)),
        inverse_norms,
        epsilon,
        num_columns,
        WITH_ROWS=with_rows,
        COLUMNS=triton.next_power_of_2(num_columns),
        num_warps=8,
    )
    return output, inverse_norms, rows


@triton.jit
def _norm_gradient(gradient, x, weight, inverse_norms, output, num_columns, COLUMNS: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    place = row * num_columns + column
    given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
    incoming *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse_norm = tl.load(inverse_norms + row)
    along = tl.sum(incoming * given) * inverse_norm * inverse_norm / num_columns
    value = inverse_norm * (incoming - along * given)
    tl.store(output + place, value.to(output.dtype.element_ty), mask=inside)


def rms_norm_gradient(gradient: Tensor, x: Tensor, weight: Tensor, inverse_norms: Tensor) -> Tensor:
    """The gradient of x, (rows, columns); the weight is frozen."""
    num_rows, num_columns = x.shape
    output = torch.empty_like(x)
    _norm_gradient[(num_rows,)](
        gradient,
        x,
        weight,
        inverse_norms,
        output,
        num_columns,
        COLUMNS=triton.next_power_of_2(num_columns),
        num_warps=8,
    )
    return output


@triton.jit
def _silu_product(gate, up, output, e4m3, scales, WIDTH: tl.constexpr, WITH_ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    gate += row * WIDTH
    up += row * WIDTH
    output += row * WIDTH
    largest = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        other = tl.load(up + column, mask=inside, other=0.0, eviction_policy="evict_first")
        wide = tl.load(gate + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        opened = (wide * tl.sigmoid(wide)).to(other.dtype)
        value = (opened.to(tl.float32) * other.to(tl.float32)).to(other.dtype)
        tl.store(output + column, value, mask=inside)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float32)))
    if WITH_ROWS:
        scale = scale_of(tl.max(largest))
        tl.store(scales + row, scale)
        tl.debug_barrier()  # other threads may read what these have written
        write_e4m3(output, e4m3 + row * WIDTH, scale, WIDTH, CHUNK)


def silu_product(gate: Tensor, up: Tensor, *, with_rows: bool) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """silu(gate) * up of (rows, columns) without gaps; with_rows: and the same in e4m3 with the scale of every row."""
    num_rows, width = gate.shape
    output = torch.empty_like(gate)
    rows = _empty_rows(num_rows, width, gate.device) if with_rows else None
    _silu_product[(num_rows,)](
        gate, up, output, *(rows or (output, output)), WIDTH=width, WITH_ROWS=with_rows, CHUNK=CHUNK,
        num_warps=CHUNK_WARPS,
    )  # fmt: skip
    return output, rows


@triton.jit
def _silu_gradients(
    gradient, gate, up, e4m3, scales, WIDTH: tl.constexpr, WITH_ROWS: tl.constexpr, CHUNK: tl.constexpr
):
    """One row; gate and up become their gradients."""
    row = tl.program_id(0).to(tl.int64)
    gradient += row * WIDTH
    gate += row * WIDTH
    up += row * WIDTH
    largest = tl.zeros((CHUNK,), dtype=tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        inside = column < WIDTH
        incoming = tl.load(gradient + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        given = tl.load(gate + column, mask=inside, other=0.0)
        other = tl.load(up + column, mask=inside, other=0.0).to(tl.float32)
        wide = given.to(tl.float32)
        sigmoid = tl.sigmoid(wide)
        opened = wide * sigmoid
        of_gate = (incoming * (opened * (1 - sigmoid) + sigmoid) * other).to(given.dtype)
        of_up = (incoming * opened).to(given.dtype)
        tl.store(gate + column, of_gate, mask=inside)
        tl.store(up + column, of_up, mask=inside)
        largest = tl.maximum(largest, tl.abs(of_gate.to(tl.float32)))
        largest = tl.maximum(largest, tl.abs(of_up.to(tl.float32)))
    if WITH_ROWS:
        scale = scale_of(tl.max(largest))
        tl.store(scales + row, scale)
        tl.debug_barrier()  # other threads may read what these have written
        e4m3 += row * (2 * WIDTH)
        write_e4m3(gate, e4m3, scale, WIDTH, CHUNK)
        write_e4m3(up, e4m3 + WIDTH, scale, WIDTH, CHUNK)


def silu_gradients_in_place(
    gradient: Tensor, gate: Tensor, up: Tensor, *, with_rows: bool
) -> tuple[Tensor, Tensor] | None:
    """Overwrite gate and up with their gradients; all are (rows, columns) without gaps.

    Returns:
        If with_rows: both side by side in e4m3, (rows, 2 x columns), and one scale a row over both.
    """
    num_rows, width = gate.shape
    rows = _empty_rows(num_rows, 2 * width, gate.device) if with_rows else None
    _silu_gradients[(num_rows,)](
        gradient, gate, up, *(rows or (gate, gate)), WIDTH=width, WITH_ROWS=with_rows, CHUNK=CHUNK,
        num_warps=CHUNK_WARPS,
    )  # fmt: skip
    return rows


def _empty_rows(num_rows: int, num_columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((num_rows, num_columns), dtype=torch.float8_e4m3fn, device=device),
        torch.empty((num_rows, 1), dtype=torch.float32, device=device),
    )
