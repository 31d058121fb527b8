"""The GPU paths against fp32 references: variable-length attention, Liger norms and SwiGLU, the fused layer."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def close(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    assert difference < bound, float(difference)


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("window", [None, 64])
def test_flash_over_documents_equals_the_loop(key_heads: int, window: int | None) -> None:
    from anima.model.attention import packed_attention, uses_flash

    lengths = [300, 1, 77, 512]
    boundaries = torch.tensor([0, 300, 301, 378, 890], dtype=torch.int32, device="cuda")
    states = [torch.randn(1, heads, 890, 64, device="cuda") for heads in (8, key_heads, key_heads)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [state.to(dtype).requires_grad_(True) for state in states]
        assert uses_flash(inputs[0].device, dtype, 64) == (dtype == torch.bfloat16)
        output, _ = packed_attention(
            torch.nn.Identity(),
            *inputs,
            None,
            sliding_window=window,
            cu_seqlens=boundaries,
            document_lengths=lengths,
        )
        output.float().square().sum().backward()
        results.append([output, *(tensor.grad for tensor in inputs)])
    for got, expected in zip(*results, strict=True):
        close(got, expected, 2e-2)


def test_liger_norm_and_product_equal_the_formulas() -> None:
    from anima.model.kernels import rms_norm, silu_product, uses_liger

    if not uses_liger(torch.device("cuda")):
        pytest.skip("liger-kernel is not installed")
    x, weight = torch.randn(1, 500, 6656), torch.rand(6656) + 0.5
    gate, up = torch.randn(2, 1, 500, 17920)
    for function, inputs in ((rms_norm, (x, weight)), (silu_product, (gate, up))):
        extra = (1e-6,) if function is rms_norm else ()
        gradients = []
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
            moved = [tensor.to(dtype).to(device, copy=True).requires_grad_(True) for tensor in inputs]
            output = function(*moved, *extra)  # type: ignore[operator]
            (output.float() * torch.linspace(-1, 1, output.shape[-1], device=device)).sum().backward()
            gradients.append([output.detach().cpu(), moved[0].grad.cpu()])
        for got, expected in zip(*gradients, strict=True):
            close(got, expected, 1e-2)


def test_the_fused_layer_over_nf4_equals_fp32() -> None:
    import bitsandbytes as bnb

    from anima.model.qlora_linear import Projection, base_weight, fused_lora_linear

    linear = torch.nn.Linear(1024, 512, bias=False)
    base = bnb.nn.Linear4bit(1024, 512, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.load_state_dict(linear.state_dict())
    base = base.cuda().requires_grad_(False)
    x, a, b = torch.randn(700, 1024), torch.randn(64, 1024) / 32, torch.randn(512, 64) / 8
    target = torch.randn(700, 512)
    ours = [tensor.cuda().bfloat16().requires_grad_(True) for tensor in (x, a, b)]
    output = fused_lora_linear(ours[0], [Projection(base, ours[1], ours[2], 0.25)])[0]
    (output * target.cuda().bfloat16()).sum().backward()
    wide = [tensor.detach().double().requires_grad_(True) for tensor in ours]
    weight = base_weight(base, torch.bfloat16).double()
    expected = wide[0] @ weight.T + 0.25 * (wide[0] @ wide[1].T) @ wide[2].T
    (expected * target.cuda().bfloat16().double()).sum().backward()
    close(output, expected, 1e-2)
    for got, reference in zip(ours, wide, strict=True):
        close(got.grad, reference.grad, 1e-2)
