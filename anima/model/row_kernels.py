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
    added,
    weight,
    total,
    output,
    e4m3,
    scales,
    inverse_norms,
    epsilon,
    num_columns,
    WITH_SUM: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    KNOWN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row, rounded before and after the weight as Llama's norm is; KNOWN: the inverse norms are there already."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < num_columns
    place = row * num_columns + column
    given = tl.load(x + place, mask=inside, other=0.0)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if WITH_SUM:
        given = (given.to(tl.float32) + tl.load(added + place, mask=inside, other=0.0).to(tl.float32)).to(given.dtype)
        tl.store(total + place, given, mask=inside)
    wide = given.to(tl.float32)
    if KNOWN:
        inverse_norm = tl.load(inverse_norms + row)
    else:
        inverse_norm = tl.rsqrt(tl.sum(wide * wide) / num_columns + epsilon)
        tl.store(inverse_norms + row, inverse_norm)
    value = ((wide * inverse_norm).to(given.dtype).to(tl.float32) * factor).to(given.dtype)
    tl.store(output + place, value, mask=inside)
    if WITH_ROWS:
        rounded = value.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(rounded)))
        tl.store(e4m3 + place, (rounded / scale).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    added: Tensor | None = None,
    with_rows: bool,
    inverse_norms: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """RMSNorm over the last axis of x, or of x + added.

    Args:
        x: (rows, columns) without gaps.
        weight: (columns,).
        epsilon: Onto the mean of the squares.
        added: Of the shape of x.
        with_rows: Give the output in e4m3, too.
        inverse_norms: What an earlier call gave for the same rows; then the output has its bits, which another sum of
            squares may not, since kernels with and without e4m3 add in different orders.

    Returns:
        The output; what it is the norm of; 1 / the norm of every row, fp32 (rows,); the output in e4m3 and the scale of
        every row.
    """
    num_rows, num_columns = x.shape
    output = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    known = inverse_norms is not None
    if inverse_norms is None:
        inverse_norms = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    rows = _empty_rows(num_rows, num_columns, x.device) if with_rows else None
    _norm[(num_rows,)](
        x,
        x if added is None else added,
        weight,
        total,
        output,
        *(rows or (output, inverse_norms)),
        inverse_norms,
        epsilon,
        num_columns,
        WITH_SUM=added is not None,
        WITH_ROWS=with_rows,
        KNOWN=known,
        COLUMNS=triton.next_power_of_2(num_columns),
        num_warps=8,
    )
    return output, total, inverse_norms, rows


@triton.jit
def _norm_gradient(
    gradient,
    x,
    weight,
    inverse_norms,
    residual,
    output,
    e4m3,
    scales,
    num_columns,
    WITH_SUM: tl.constexpr,
    WITH_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
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
    wide = inverse_norm * (incoming - along * given)
    if WITH_SUM:
        wide += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    value = wide.to(output.dtype.element_ty)
    tl.store(output + place, value, mask=inside)
    if WITH_ROWS:
        rounded = value.to(tl.float32)
        scale = scale_of(tl.max(tl.abs(rounded)))
        tl.store(e4m3 + place, (rounded / scale).to(tl.float8e4nv), mask=inside)
        tl.store(scales + row, scale)


def rms_norm_gradient(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    inverse_norms: Tensor,
    *,
    residual: Tensor | None = None,
    with_rows: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """The gradient of x, (rows, columns), where the weight is frozen.

    Args:
        gradient: Of the output.
        x: What the output is the norm of.
        weight: (columns,).
        inverse_norms: As `rms_norm` gives them.
        residual: Gradient that x has from elsewhere, to be added.
        with_rows: Give the result in e4m3, too.
    """
    num_rows, num_columns = x.shape
    output = torch.empty_like(x)
    rows = _empty_rows(num_rows, num_columns, x.device) if with_rows else None
    _norm_gradient[(num_rows,)](
        gradient,
        x,
        weight,
        inverse_norms,
        x if residual is None else residual,
        output,
        *(rows or (output, inverse_norms)),
        num_columns,
        WITH_SUM=residual is not None,
        WITH_ROWS=with_rows,
        COLUMNS=triton.next_power_of_2(num_columns),
        num_warps=8,
    )
    return output, rows


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
