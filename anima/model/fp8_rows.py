"""Values that are made and rounded to e4m3 in one pass: norms and SwiGLU blocks before products in fp8.

Their outputs carry the rows of e4m3 with them, as an attribute that is valid once and only while nothing has written to
the tensor. A product that finds none rounds for itself, to the same bits; so nothing depends on it but time.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anima.model import fp8
from anima.model.agreement import refuse_difference

_ATTRIBUTE = "anima_fp8_rows"
Rows = tuple[Tensor, Tensor]
"""As `fp8.quantize_side_by_side` gives them."""


def attach(tensors: Sequence[Tensor], rows: Rows) -> None:
    """Let `tensors`, side by side, carry their rows."""
    setattr(tensors[0], _ATTRIBUTE, (rows, _state(tensors)))


def take(tensors: Sequence[Tensor]) -> Rows | None:
    """The rows that these very tensors carry, as they are now; once, so that nobody keeps them longer."""
    rows, state = tensors[0].__dict__.pop(_ATTRIBUTE, (None, None))
    return rows if state == _state(tensors) else None


def _state(tensors: Sequence[Tensor]) -> list[tuple[int, int, torch.Size]]:
    return [(tensor.data_ptr(), tensor._version, tensor.shape) for tensor in tensors]


def norm_again(x: Tensor, weight: Tensor, inverse_norms: Tensor | None, *, epsilon: float) -> Tensor:
    """The norm that `sum_and_norm` gave, to the bit, from its first and third result."""
    if inverse_norms is None:
        return rms_norm_by_torch(x, weight, epsilon)
    from anima.model import row_kernels

    flat = _flat(x.contiguous())
    output, *_ = row_kernels.rms_norm(flat, weight, epsilon, with_rows=False, inverse_norms=inverse_norms)
    return output.view(x.shape)


def sum_and_norm(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    epsilon: float,
    *,
    with_rows: bool = False,
    with_gradient_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum x + added, its norm as `rms_norm_by_torch` says, and on a GPU 1 / the norm of every row, fp32.

    Args:
        x: (…, columns).
        added: The same shape; None for x alone. Who needs x further on takes the first result, so that the gradients of
            both are added up in one pass.
        weight: (columns,), frozen.
        epsilon: Onto the mean of the squares.
        with_rows: The norm carries its rows.
        with_gradient_rows: The gradient of x and of added, which is the same, carries its rows; on a GPU.
    """
    if not x.is_cuda:
        total = x if added is None else x + added
        output = rms_norm_by_torch(total, weight, epsilon)
        inverse_norms, rows = None, fp8.quantize_rows(_flat(output.detach())) if with_rows else None
    else:
        total, output, inverse_norms, *found = _SumAndNorm.apply(
            x, added, weight, epsilon, with_rows, with_gradient_rows
        )  # type: ignore[no-untyped-call]
        rows = (found[0], found[1]) if with_rows else None
    if rows is not None:
        attach((output,), rows)
    return total, output, inverse_norms


def rms_norm_by_torch(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in fp32 inside (Zhang & Sennrich 2019, eq. 4)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


class _SumAndNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        epsilon: float,
        with_rows: bool,
        with_gradient_rows: bool,
    ) -> tuple[Tensor | None, ...]:
        from anima.model import row_kernels

        ctx.with_gradient_rows = with_gradient_rows
        flat = _flat(x.contiguous())
        other = None if added is None else _flat(added.contiguous())
        output, total, inverse_norms, rows = row_kernels.rms_norm(
            flat, weight, epsilon, added=other, with_rows=with_rows
        )
        total = x.view_as(x) if added is None else total.view(x.shape)
        ctx.save_for_backward(x if added is None else total, weight, inverse_norms)
        return _with_constants(ctx, (total, output.view(x.shape)), inverse_norms, *(rows or (None, None)))

    @staticmethod
    def backward(ctx: Any, residual: Tensor | None, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        from anima.model import row_kernels

        if gradient is None or not any(ctx.needs_input_grad[:2]):
            return residual, residual, None, None, None, None
        total, weight, inverse_norms = ctx.saved_tensors
        flat, gradient = _flat(total.contiguous()), _flat(gradient.contiguous())
        other = None if residual is None else _flat(residual.contiguous())
        output, rows = row_kernels.rms_norm_gradient(
            gradient, flat, weight, inverse_norms, residual=other, with_rows=ctx.with_gradient_rows
        )
        output = output.view(total.shape)
        if rows is not None:
            attach((output,), rows)
        return output, output if ctx.needs_input_grad[1] else None, None, None, None, None


def silu_product(gate: Tensor, up: Tensor, *, with_rows: bool = False, with_gradient_rows: bool = False) -> Tensor:
    """silu(gate) * up. The backward pass overwrites gate and up on a GPU.

    Args:
        gate: (…, columns).
        up: The same shape.
        with_rows: The output carries its rows.
        with_gradient_rows: The gradient of gate carries those of both gradients, side by side.
    """
    output, *rows = _SiluProduct.apply(gate, up, with_rows, with_gradient_rows)  # type: ignore[no-untyped-call]
    if with_rows:
        attach((output,), (rows[0], rows[1]))
    return output  # type: ignore[no-any-return]


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        gate: Tensor,
        up: Tensor,
        with_rows: bool,
        with_gradient_rows: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.with_gradient_rows = with_gradient_rows
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if gate.is_cuda:
            from anima.model import row_kernels

            output, rows = row_kernels.silu_product(_flat(gate), _flat(up), with_rows=with_rows)
        else:
            output = F.silu(gate) * up
            rows = fp8.quantize_rows(_flat(output)) if with_rows else None
        return _with_constants(ctx, (output.view(gate.shape),), *(rows or (None, None)))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gate, up = (saved.detach() for saved in ctx.saved_tensors)
        with_rows = ctx.with_gradient_rows and fp8.fits_side_by_side((gate, up))
        if gate.is_cuda:
            from anima.model import row_kernels

            rows = row_kernels.silu_gradients_in_place(
                _flat(gradient.contiguous()), _flat(gate), _flat(up), with_rows=with_rows
            )
        else:
            gate, up = silu_gradients_by_torch(gradient, gate, up)
            rows = fp8.quantize_side_by_side((_flat(gate), _flat(up))) if with_rows else None
        if rows is not None:
            attach((gate, up), rows)
        return gate, up, None, None


def silu_gradients_by_torch(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The reference of the kernel: in fp32, rounded once."""
    wide, incoming = gate.float(), gradient.float()
    sigmoid = torch.sigmoid(wide)
    opened = wide * sigmoid
    of_gate = incoming * (opened * (1 - sigmoid) + sigmoid) * up.float()
    return of_gate.to(gate.dtype), (incoming * opened).to(up.dtype)


def check_kernels(norm_weight: Tensor, width: int) -> None:
    """The kernels against their references, as `fp8` checks its own: at the sizes of this run, on a GPU.

    Args:
        norm_weight: (hidden,) of a norm that gives rows.
        width: Of a SwiGLU product.

    Raises:
        ModelError: they differ.
    """
    if not norm_weight.is_cuda:
        return
    x, target = norm_weight.new_empty(2, 64, norm_weight.shape[0]).normal_().unbind()
    gate, up, gradient = norm_weight.new_empty(3, 64, width).normal_().unbind()
    with torch.enable_grad():
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, up)]
        outputs = (
            sum_and_norm(leaves[0], None, norm_weight, 1e-6, with_rows=True)[1],
            silu_product(leaves[1], leaves[2], with_rows=True, with_gradient_rows=True),
        )
        wide = x.float().requires_grad_()
        norm = rms_norm_by_torch(wide, norm_weight.float(), 1e-6)
    products = norm.detach(), F.silu(gate) * up
    for name, output, product in zip(("norm", "SwiGLU product"), outputs, products, strict=True):
        rows = take((output,))
        refuse_difference(name, output.detach(), product)
        refuse_difference(f"rows of a {name}", rows[0] if rows else output, fp8.rows_by_torch(output.detach())[0])
    of_gate, of_up = torch.autograd.grad(outputs[1], leaves[1:], gradient)
    rows = take((of_gate, of_up))
    both = fp8.rows_by_torch(torch.cat((of_gate, of_up), dim=1))[0]
    refuse_difference("rows of SwiGLU's gradients", rows[0] if rows else of_gate, both)
    for got, expected in zip((of_gate, of_up), silu_gradients_by_torch(gradient, gate, up), strict=True):
        refuse_difference("SwiGLU's gradients", got, expected)
    of_norm, exact = (
        torch.autograd.grad(*of)[0] for of in ((outputs[0], leaves[0], target), (norm, wide, target.float()))
    )
    refuse_difference("a norm's gradient", of_norm, exact)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.shape[-1])


def _with_constants(ctx: Any, outputs: tuple[Tensor, ...], *constants: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Outputs, and what no gradient belongs to."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(constant for constant in constants if constant is not None))
    return outputs + constants
