"""One linear layer with LoRA as a single autograd function: y = W x + b + s B (A d(x)), where W is frozen.

The base may be NF4: it is dequantised in the forward pass and again in the backward pass, never kept. The LoRA
products are added inside the matrix multiplications (`addmm_`), so no element-wise pass over the output is left.
Saved for the backward pass: the input (one tensor for all layers that share it, or a recipe for it) and A d(x).
"""

from typing import cast

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from anima.model import fp8
from anima.model.nf4 import dequantize
from anima.model.recompute import recipe_of


def fused_lora_linear(
    x: Tensor, base: nn.Linear, a_weight: Tensor, b_weight: Tensor, scaling: float, dropped: Tensor | None = None
) -> Tensor:
    """A frozen linear layer and its LoRA update (Hu et al. 2021, eq. 3), differentiable in x, A and B.

    Args:
        x: (…, in).
        base: Frozen layer, NF4 or 16/32 bit, with or without bias.
        a_weight: (r, in), in the number format of x.
        b_weight: (out, r), in the number format of x.
        scaling: Factor of the update.
        dropped: d(x), the input of A where LoRA dropout is on; None where it is x itself.

    Returns:
        (…, out), in the number format of x.
    """
    source = x if dropped is None else dropped
    output: Tensor = _FusedLoraLinear.apply(x, source, base, a_weight, b_weight, scaling)  # type: ignore[no-untyped-call]
    return output


def base_weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The frozen weight as the computation sees it, (out, in)."""
    weight = base.weight.data
    if isinstance(base, Linear4bit):
        weight = dequantize(weight, base.weight.quant_state)  # type: ignore[attr-defined]
    return weight.to(dtype)


def frozen_linear(x: Tensor, base: nn.Linear) -> Tensor:
    """W x + b of the frozen layer alone, in bf16 or fp8 as the layer is set up; not differentiable.

    Args:
        x: (…, in).
        base: Frozen layer.

    Returns:
        (tokens, out), in the number format of x.
    """
    bias = None if base.bias is None else base.bias.data.to(x.dtype)
    if fp8.uses_fp8(base):
        output = fp8.product(x, base)
        return output if bias is None else output.add_(bias)
    return torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), base_weight(base, x.dtype), bias)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, whatever the factors are: the gradient of a parameter, to be added to others."""
    if left.dtype == torch.float32:
        return left @ right
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _FusedLoraLinear(torch.autograd.Function):
    """Shapes: T tokens, I inputs, O outputs, R rank."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        source: Tensor,
        base: nn.Linear,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        source_TI = source.reshape(-1, x.shape[-1])
        output_TO = frozen_linear(x, base)
        down_TR = source_TI @ a_RI.T
        output_TO.addmm_(down_TR, b_OR.T, alpha=scaling)
        recipe = recipe_of(source)
        kept_TI = source_TI if recipe is None else source_TI.new_empty(0)
        ctx.save_for_backward(kept_TI, down_TR, a_RI, b_OR)
        ctx.recipe = recipe  # type: ignore[attr-defined]
        ctx.base, ctx.scaling, ctx.shape = base, scaling, x.shape  # type: ignore[attr-defined]
        ctx.shared = source is x  # type: ignore[attr-defined]
        return output_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.BackwardCFunction, gradient: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor, Tensor, None]:
        source_TI, down_TR, a_RI, b_OR = cast(tuple[Tensor, ...], ctx.saved_tensors)
        if ctx.recipe is not None:  # type: ignore[attr-defined]
            source_TI = ctx.recipe().reshape(-1, ctx.shape[-1])  # type: ignore[attr-defined]
            ctx.recipe = None  # type: ignore[attr-defined]  # lets go of what the recipe holds
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        scaling: float = ctx.scaling  # type: ignore[attr-defined]
        up_TR = gradient_TO @ b_OR
        up_TR *= scaling
        gradient_a = _wide_product(up_TR.T, source_TI)
        gradient_b = _wide_product(gradient_TO.T, down_TR).mul_(scaling)
        wants_x, wants_source = cast(tuple[bool, ...], ctx.needs_input_grad)[:2]
        gradient_x = gradient_source = None
        if wants_x:
            base: nn.Linear = ctx.base  # type: ignore[attr-defined]
            if fp8.uses_fp8(base):
                gradient_x = fp8.product_transposed(gradient_TO, base)
            else:
                gradient_x = gradient_TO @ base_weight(base, gradient.dtype)
            if ctx.shared:  # type: ignore[attr-defined]
                gradient_x.addmm_(up_TR, a_RI)
            gradient_x = gradient_x.view(ctx.shape)  # type: ignore[attr-defined]
        if wants_source and not ctx.shared:  # type: ignore[attr-defined]
            gradient_source = (up_TR @ a_RI).view(ctx.shape)  # type: ignore[attr-defined]
        return gradient_x, gradient_source, None, gradient_a, gradient_b, None
