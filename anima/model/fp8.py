"""Products with the frozen base in fp8 (e4m3): the memory of 4 bits at the speed of 8.

A weight goes from its NF4 nibbles to e4m3 when it is needed and is never kept; one scale a matrix, or one for all that
read the same input. Activations and incoming gradients get one scale a row. Nothing saturates: each scale is the
largest magnitude over 448 (Micikevicius et al. 2022, e4m3). LoRA, norms, attention and loss stay in bf16;
LoRA's update joins the product before it is rounded, because added to a rounded output most of a small update is lost,
and with it what the training has learned so far.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_blockwise
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from anima.errors import ModelError
from anima.model.agreement import refuse_difference
from anima.model.nf4 import dequantize, unpack

E4M3_MAX = 448.0
MULTIPLE = 16
"""Both sides of a matrix must be multiples of this for the fp8 product."""
LARGEST_WEIGHT_ERROR = 0.05
"""Relative error of a matrix in e4m3 from which it stays in bf16; rounding alone gives about 0.026."""
_ATTRIBUTE = "anima_fp8"


@dataclass(frozen=True)
class WeightScales:
    """Scales of one frozen matrix: value = e4m3 x scale."""

    inverse: Tensor
    """1 / scale, fp32 scalar; the same object in all matrices of a group."""
    rows: Tensor
    """The scale for every output, (1, out)."""
    columns: Tensor
    """The scale for every input, (1, in)."""
    forward: bool = True
    """False if products with inputs stay in bf16, and only those with gradients run in fp8."""


def uses_fp8(base: nn.Module) -> bool:
    """Whether products of gradients with this frozen layer run in fp8."""
    return hasattr(base, _ATTRIBUTE)


def forward_uses_fp8(base: nn.Module) -> bool:
    """Whether products of inputs with this frozen layer run in fp8."""
    scales: WeightScales | None = getattr(base, _ATTRIBUTE, None)
    return scales is not None and scales.forward


def enable_fp8(model: nn.Module, groups: Sequence[Sequence[nn.Linear]], *, forward: bool = True) -> list[str]:
    """Let the given frozen layers compute in fp8.

    Args:
        model: Where the layers are, for their names.
        groups: Frozen NF4 layers; those of a group read the same input, and get one scale for all their weights, so
            that the gradient of that input is one product.
        forward: False for the products of gradients alone: what the layers give stays in bf16, to the bit.

    Returns:
        Names of those that stay in bf16: sides that fp8 products cannot have, or weights that e4m3 cannot hold.

    Raises:
        ModelError: a layer is not NF4, or the kernels compute something else on this GPU.
    """
    names = {id(module): name for name, module in model.named_modules()}
    left, checked = [], False
    for group in groups:
        nf4 = []
        for layer in group:
            if not isinstance(layer, Linear4bit):
                raise ModelError(
                    "fp8 products are made from an NF4 base",
                    where=names[id(layer)],
                    got="16 bits",
                    fix="--quantization nf4",
                )
            if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
                left.append(names[id(layer)])
            else:
                nf4.append(layer)
        for layer, scales in zip(nf4, _scales(nf4, forward), strict=True):
            if not checked:
                _check_kernels(layer, scales)
                checked = True
            if _weight_error(layer, scales) > LARGEST_WEIGHT_ERROR:
                left.append(names[id(layer)])
            else:
                setattr(layer, _ATTRIBUTE, scales)
    return left


def share_scale(bases: Sequence[nn.Linear]) -> bool:
    """Whether all of these layers compute in fp8 and were set up as one group."""
    found: list[WeightScales | None] = [getattr(base, _ATTRIBUTE, None) for base in bases]
    return len({scales and id(scales.inverse) for scales in found}) == 1 and found[0] is not None


def product(
    rows: tuple[Tensor, Tensor], base: nn.Linear, dtype: torch.dtype, update: tuple[Tensor, Tensor, float] | None = None
) -> Tensor:
    """x W^T + b + scaling x left @ right over fp8, added up in fp32 and rounded once.

    Args:
        rows: x, (tokens, in), as `quantize_rows` gives it.
        base: A layer that `enable_fp8` set up.
        dtype: Of the result.
        update: left, (tokens, r), right, (r, out), and scaling; None gives the same bits as one of zeros.

    Returns:
        (tokens, out).
    """
    scales: WeightScales = getattr(base, _ATTRIBUTE)
    weight = weight_in_fp8(base, scales, transposed=False)
    bias = None if base.bias is None else base.bias.data
    if weight.is_cuda:
        from anima.model import fp8_kernels

        return fp8_kernels.product(rows, weight, scales.rows, bias, update, dtype)
    return finished_by_torch(rows[0].float() @ weight.float().T, rows[1], scales.rows, bias, update).to(dtype)


def finished_by_torch(
    raw_TO: Tensor,
    row_scales: Tensor,
    column_scales: Tensor,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """The reference of the kernel, in fp32."""
    output = raw_TO * row_scales * column_scales
    if update is not None:
        left_TR, right_RO, scaling = update
        output += scaling * (left_TR.float() @ right_RO.float())
    return output if bias is None else output + bias.float()


def product_transposed(
    gradients: Sequence[Tensor], bases: Sequence[nn.Linear], rows: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The sum of gradient_i W_i over fp8, one product whose sums are those of the matrix units.

    Args:
        gradients: (tokens, out_i) of every layer.
        bases: One layer, or a group that `share_scale`.
        rows: The gradients side by side, if somebody has them already as `quantize_side_by_side` gives them.

    Returns:
        (tokens, in).
    """
    values, row_scales = rows or quantize_side_by_side(gradients)
    scales: WeightScales = getattr(bases[0], _ATTRIBUTE)
    return _scaled_product(values, _side_by_side(bases), row_scales, scales.columns, gradients[0].dtype)


def fits_side_by_side(gradients: Sequence[Tensor]) -> bool:
    """Whether matrix libraries, some of which count in 32 bits, can take them as one matrix."""
    return sum(gradient.numel() for gradient in gradients) < 2**31


def _side_by_side(bases: Sequence[nn.Linear]) -> Tensor:
    """The transposed frozen matrices as e4m3, (in, sum of out)."""
    scales: list[WeightScales] = [getattr(base, _ATTRIBUTE) for base in bases]
    if len(bases) == 1:
        return weight_in_fp8(bases[0], scales[0], transposed=True)
    widths = [base.out_features for base in bases]
    joined = torch.empty((bases[0].in_features, sum(widths)), dtype=torch.float8_e4m3fn, device=bases[0].weight.device)
    for base, of_base, part in zip(bases, scales, joined.split(widths, dim=1), strict=True):
        weight_in_fp8(base, of_base, transposed=True, output=part)
    return joined


def quantize_side_by_side(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(rows, columns_i) as one matrix of e4m3, (rows, sum of columns), and one scale for every row, fp32 (rows, 1)."""
    if len(parts) == 1:
        return quantize_rows(parts[0])
    if parts[0].is_cuda:
        from anima.model import fp8_kernels

        return fp8_kernels.quantize_side_by_side([part.contiguous() for part in parts])
    return rows_by_torch(torch.cat(tuple(parts), dim=1))


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) as e4m3, and the scale of every row, fp32 (rows, 1)."""
    values = values.contiguous()
    if values.is_cuda:
        from anima.model import fp8_kernels

        return fp8_kernels.quantize_rows(values)
    return rows_by_torch(values)


def rows_by_torch(values: Tensor) -> tuple[Tensor, Tensor]:
    """The reference of the kernel."""
    wide = values.float()
    scales = wide.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / E4M3_MAX
    return (wide / scales).to(torch.float8_e4m3fn), scales


def weight_in_fp8(base: nn.Linear, scales: WeightScales, *, transposed: bool, output: Tensor | None = None) -> Tensor:
    """The frozen matrix as e4m3, (out, in), or (in, out) if transposed; both row-major; into `output` if given."""
    if base.weight.is_cuda:
        state = cast(Any, base.weight).quant_state
        return unpack(
            base.weight.data,
            state,
            torch.float8_e4m3fn,
            inverse_scale=scales.inverse,
            transposed=transposed,
            output=output,
        )
    weight = weight_by_torch(base, scales, transposed=transposed)
    return weight if output is None else output.copy_(weight)


def weight_by_torch(base: nn.Linear, scales: WeightScales, *, transposed: bool) -> Tensor:
    """The reference of the kernel."""
    weight = (_exact(base) * scales.inverse).to(torch.float8_e4m3fn)
    return weight.T.contiguous() if transposed else weight


def _scaled_product(
    left: Tensor, right: Tensor, left_scales: Tensor, right_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """left right^T with one scale for every row of either, (M, K) and (N, K) to (M, N)."""
    output: Tensor = torch._scaled_mm(
        left, right.t(), scale_a=left_scales, scale_b=right_scales, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    return output.to(dtype)


def _scales(bases: Sequence[Linear4bit], forward: bool = True) -> list[WeightScales]:
    """Of every matrix of a group: the scale is that of the largest weight of all."""
    if not bases:
        return []
    scale = (torch.stack([_largest_weight(base) for base in bases]).max() / E4M3_MAX).clamp_min(1e-12)
    inverse, columns = (1 / scale).reshape(()), scale.expand(1, bases[0].in_features).contiguous()
    rows = [scale.expand(1, base.out_features).contiguous() for base in bases]
    return [WeightScales(inverse, of_base, columns, forward) for of_base in rows]


def _largest_weight(base: Linear4bit) -> Tensor:
    """Magnitude, fp32 scalar."""
    state = cast(Any, base.weight).quant_state
    absmax: Tensor = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2).float() + state.offset
    return absmax.float().max()


def _weight_error(base: nn.Linear, scales: WeightScales) -> float:
    """Relative error that e4m3 adds to a matrix, as the norm of the difference over the norm."""
    exact = _exact(base)
    rounded = weight_in_fp8(base, scales, transposed=False).float() / scales.inverse
    return float((rounded - exact).norm() / exact.norm().clamp_min(1e-12))


def _exact(base: nn.Linear) -> Tensor:
    """The NF4 matrix in fp32, (out, in), without a rounding to bf16 in between."""
    state = copy.copy(cast(Any, base.weight).quant_state)
    state.dtype = torch.float32
    return dequantize(base.weight.data, state)


def _check_kernels(base: nn.Linear, scales: WeightScales) -> None:
    """The kernels against their reference on a real matrix of this run: a silent error would cost the whole run."""
    if not base.weight.is_cuda:
        return
    from anima.model import fp8_kernels

    rows = torch.randn(64, base.in_features, device=base.weight.device, dtype=torch.bfloat16)
    update = (rows[:, :8].contiguous(), rows[:1, :8].repeat(base.out_features, 1).T, 0.5)
    quantized = quantize_rows(rows)
    refuse_difference("rows", quantized[0], rows_by_torch(rows)[0])
    weight = weight_in_fp8(base, scales, transposed=False)
    if scales.forward:
        raw = quantized[0].float() @ weight.float().T
        got = fp8_kernels.product(quantized, weight, scales.rows, None, update, rows.dtype)
        refuse_difference("product", got, finished_by_torch(raw, quantized[1], scales.rows, None, update))
    values, of_rows = quantize_rows(rows.new_empty(64, base.out_features).normal_())
    turned = weight_in_fp8(base, scales, transposed=True)
    got = _scaled_product(values, turned, of_rows, scales.columns, rows.dtype)
    raw = values.float() @ turned.float().T
    refuse_difference("product of gradients", got, finished_by_torch(raw, of_rows, scales.columns, None, None))
    parts = [rows, 2 * rows, -rows]
    refuse_difference("side by side", quantize_side_by_side(parts)[0], rows_by_torch(torch.cat(parts, dim=1))[0])
    for flip in (False, True):
        expected = weight_by_torch(base, scales, transposed=flip)
        refuse_difference("weight", weight_in_fp8(base, scales, transposed=flip), expected)
        wider = torch.empty(len(expected), 2 * expected.shape[1], dtype=expected.dtype, device=expected.device)
        part = wider[:, expected.shape[1] :]
        refuse_difference("part of a weight", weight_in_fp8(base, scales, transposed=flip, output=part), expected)
