"""Linear layers with LoRA as a single autograd function: y_i = W_i x + b_i + s_i B_i (A_i d(x)), where W is frozen.

Layers that read the same input go together: it is multiplied once with all their A, and its gradient is summed inside
the matrix products. The base may be NF4: it is dequantised in the forward pass and again in the backward pass, never
kept. Sums are taken inside the matrix multiplications (`addmm_`), so no element-wise pass is left.
Saved for the backward pass: the input (or what makes it again) and A d(x).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from anima.model import fp8, fp8_rows
from anima.model.nf4 import BLOCK_SIZE, dequantize
from anima.model.recompute import recipe_of


@dataclass(frozen=True)
class Projection:
    """A frozen linear layer and its LoRA update."""

    base: nn.Linear
    """NF4 or 16/32 bit, with or without bias."""
    a_weight: Tensor
    """(r, in), in the number format of the input."""
    b_weight: Tensor
    """(out, r), likewise."""
    scaling: float
    """Factor of the update."""


@dataclass(frozen=True)
class _Update:
    """scaling x left @ right, (tokens, r) and (r, features)."""

    left: Tensor
    right: Tensor
    scaling: float = 1.0

    def product(self, bias: Tensor | None = None) -> Tensor:
        """The update, and a bias."""
        start = self.left.new_empty(1) if bias is None else bias  # with beta = 0 it is not read
        return torch.addmm(start, self.left, self.right, beta=0 if bias is None else 1, alpha=self.scaling)

    def add_to(self, output: Tensor) -> Tensor:
        """Onto the product that it updates."""
        return output.addmm_(self.left, self.right, alpha=self.scaling)


def fused_lora_linear(
    x: Tensor, projections: Sequence[Projection], dropped: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Frozen linear layers over one input, with their LoRA updates (Hu et al. 2021, eq. 3).

    Differentiable in x, A and B.

    Args:
        x: (…, in).
        projections: One or more that read x.
        dropped: d(x), the input of A where LoRA dropout is on; None where it is x itself.

    Returns:
        (…, out) of every projection, in the number format of x.
    """
    source = x if dropped is None else dropped
    if not torch.is_grad_enabled():
        outputs, _ = _forward(x, source, projections)
        return tuple(outputs)
    weights = [weight for p in projections for weight in (p.a_weight, p.b_weight)]
    trained: tuple[Tensor, ...] = _FusedLoraLinear.apply(x, source, projections, *weights)  # type: ignore[no-untyped-call]
    return trained


def _forward(x: Tensor, source: Tensor, projections: Sequence[Projection]) -> tuple[list[Tensor], Tensor]:
    """(…, out) of every projection, and A d(x) of all, (tokens, r)."""
    down_TR = source.reshape(-1, x.shape[-1]) @ _joined([p.a_weight for p in projections]).T
    downs = down_TR.split([p.a_weight.shape[0] for p in projections], dim=1)
    updates = [_Update(down, p.b_weight.T, p.scaling) for down, p in zip(downs, projections, strict=True)]
    outputs = frozen_linear(x, [p.base for p in projections], updates)
    return [output_TO.view(*x.shape[:-1], -1) for output_TO in outputs], down_TR


def base_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The frozen weight as the computation sees it, (out, in)."""
    weight = base.weight.data
    if isinstance(base, Linear4bit):
        weight = dequantize(weight, base.weight.quant_state)  # type: ignore[attr-defined]
    return weight.to(dtype)


def frozen_linear(x: Tensor, bases: Sequence[nn.Linear], updates: Sequence[_Update] | None = None) -> list[Tensor]:
    """W x + b of frozen layers, in bf16 or fp8 as each layer is set up, and their LoRA updates; not differentiable.

    Updates join a product before it is rounded, where small ones would be lost: a product in bf16 adds to them while it
    computes, one in fp8 is finished with them by a kernel of ours.

    Args:
        x: (…, in).
        bases: One or more frozen layers.
        updates: Of each base; None for the bases alone.

    Returns:
        (tokens, out) of each, in the number format of x.
    """
    flat, rows, outputs = x.reshape(-1, x.shape[-1]), fp8_rows.take((x,)), []
    for index, base in enumerate(bases):
        bias = None if base.bias is None else base.bias.data.to(x.dtype)
        update = None if updates is None else updates[index]
        if fp8.forward_uses_fp8(base):
            rows = rows or fp8.quantize_rows(flat)
            parts = None if update is None else (update.left, update.right, update.scaling)
            outputs.append(fp8.product(rows, base, x.dtype, parts))
        elif len(flat) == 1 and _multiplies_packed(base, x):
            output = matmul_4bit(flat, base.weight.data.t(), base.weight.quant_state, bias=bias)  # type: ignore[attr-defined]
            outputs.append(output if update is None else update.add_to(output))
        elif update is None:
            outputs.append(torch.nn.functional.linear(flat, base_weight(base, x.dtype), bias))
        else:
            outputs.append(update.product(bias).addmm_(flat, base_weight(base, x.dtype).T))
    return outputs


def _multiplies_packed(base: nn.Linear, x: Tensor) -> bool:
    """Whether bitsandbytes multiplies one row with the packed matrix itself here: a quarter of the memory to read."""
    return x.is_cuda and isinstance(base, Linear4bit) and base.in_features % BLOCK_SIZE == 0


def _input_gradient(
    gradients: Sequence[Tensor], bases: Sequence[nn.Linear], update: _Update | None, rows: fp8_rows.Rows | None = None
) -> Tensor:
    """The sum of gradient_i W_i and of the update: (tokens, out_i) to (tokens, in); rows as `fp8` takes them."""
    update_last = fp8.uses_fp8(bases[0])  # its product cannot add to anything
    if fp8.share_scale(bases) and fp8.fits_side_by_side(gradients):
        output = fp8.product_transposed(gradients, bases, rows)
        return output if update is None else update.add_to(output)
    total = None if update is None or update_last else update.product()
    for gradient, base in zip(gradients, bases, strict=True):
        if fp8.uses_fp8(base):
            part = fp8.product_transposed([gradient], [base])
            total = part if total is None else total.add_(part)
        else:
            weight = base_weight(base, gradient.dtype)
            total = gradient @ weight if total is None else total.addmm_(gradient, weight)
    assert total is not None
    return update.add_to(total) if update is not None and update_last else total


def _wide_product(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    """scaling x left @ right in fp32, whatever the factors are: the gradient of a parameter, to be added to others."""
    start = left.new_empty(1, dtype=torch.float32)  # with beta = 0 it is not read
    if left.device.type == "cuda" and left.dtype != torch.float32:
        return torch.addmm(start, left, right, out_dtype=torch.float32, beta=0, alpha=scaling)
    return torch.addmm(start, left.float(), right.float(), beta=0, alpha=scaling)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(tuple(weights))


class _FusedLoraLinear(torch.autograd.Function):
    """Shapes: T tokens, I inputs, O outputs, R ranks, those of all projections side by side."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (attributes of ours on torch's context)
        x: Tensor,
        source: Tensor,
        projections: Sequence[Projection],
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs, down_TR = _forward(x, source, projections)
        recipe = recipe_of(source)
        kept = (source.reshape(-1, x.shape[-1]),) if recipe is None else recipe.sources
        ctx.save_for_backward(down_TR, *weights, *kept)
        ctx.remake = None if recipe is None else recipe.function
        ctx.bases, ctx.scalings = [p.base for p in projections], [p.scaling for p in projections]
        ctx.ranks, ctx.shape = [p.a_weight.shape[0] for p in projections], x.shape
        ctx.shared = source is x
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        down_TR, *saved = ctx.saved_tensors
        count = 2 * len(ctx.bases)
        a_weights, b_weights, kept = saved[:count:2], saved[1:count:2], saved[count:]
        source_TI = (kept[0] if ctx.remake is None else ctx.remake(*kept)).reshape(-1, ctx.shape[-1])
        flat = [gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients]
        up_TR = torch.empty_like(down_TR)
        for up, gradient_TO, b_OR, scaling in zip(
            up_TR.split(ctx.ranks, dim=1), flat, b_weights, ctx.scalings, strict=True
        ):
            torch.addmm(up, gradient_TO, b_OR, beta=0, alpha=scaling, out=up)
        gradient_a = _wide_product(up_TR.T, source_TI).split(ctx.ranks)
        gradient_b = [
            _wide_product(gradient.T, down, scaling)
            for gradient, down, scaling in zip(flat, down_TR.split(ctx.ranks, dim=1), ctx.scalings, strict=True)
        ]
        wants_x, wants_source = ctx.needs_input_grad[:2]
        gradient_x = gradient_source = None
        if wants_x:
            update = _Update(up_TR, _joined(a_weights)) if ctx.shared else None
            gradient_x = _input_gradient(flat, ctx.bases, update, fp8_rows.take(gradients)).view(ctx.shape)
        if wants_source and not ctx.shared:
            gradient_source = (up_TR @ _joined(a_weights)).view(ctx.shape)
        pairs = [gradient for pair in zip(gradient_a, gradient_b, strict=True) for gradient in pair]
        return gradient_x, gradient_source, None, *pairs
