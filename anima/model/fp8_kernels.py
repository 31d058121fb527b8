"""Triton kernel of the fp8 products: rows of activations to e4m3.

Imported only where it runs (a GPU, or Triton's interpreter in the tests); `anima.model.fp8` holds the same arithmetic
in torch, which is its reference and what a CPU computes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as e4m3 and the scale of every row, fp32 (rows, 1)."""
    num_rows, num_columns = values.shape
    output = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=values.device)
    _quantize_row[(num_rows,)](
        values, output, scales, num_columns, COLUMNS=triton.next_power_of_2(num_columns), num_warps=8
    )
    return output, scales
