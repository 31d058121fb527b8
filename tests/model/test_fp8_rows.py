"""Rows of e4m3 that travel with tensors, and groups whose gradient is one product: the bits of doing it separately; the
kernels (in Triton's interpreter) against the arithmetic."""

from pathlib import Path

import pytest
import torch
from interpreter import run_in_interpreter
from nf4_layer import nf4, relative
from torch import nn

from anima.config.schema import LoraConfig, ModelConfig
from anima.model import fp8, fp8_rows
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.lora import attach_lora, compute_in_fp8, lora_b_parameters, trainable_parameters
from anima.model.packed import PackedModel
from anima.model.qlora_linear import Projection, base_weight, fused_lora_linear


def test_a_group_has_one_scale_and_its_gradient_is_one_product() -> None:
    layers = [nf4(), nf4(out_features=64), nf4(out_features=32)]
    layers[1].weight = type(layers[1].weight)(3 * torch.randn(64, 192), requires_grad=False, quant_type="nf4").to("cpu")
    alone = nf4()
    fp8.enable_fp8(nn.ModuleList([*layers, alone]), [layers, [alone]])
    assert fp8.share_scale(layers)
    assert not fp8.share_scale([layers[0], alone])
    assert not fp8.share_scale([layers[0], nf4()])
    scale = 1 / layers[0].anima_fp8.inverse  # type: ignore[union-attr]
    largest = max(base_weight(layer, torch.float32).abs().max() for layer in layers)
    assert float(scale) == pytest.approx(float(largest) / 448)
    gradients = [torch.randn(50, 128), 1e-3 * torch.randn(50, 64), torch.randn(50, 32)]
    got = fp8.product_transposed(gradients, layers)
    exact = sum(g @ base_weight(layer, torch.float32) for g, layer in zip(gradients, layers, strict=True))
    assert 0.005 < relative(got, exact) < 0.045  # type: ignore[arg-type]
    values, scales = fp8.quantize_side_by_side(gradients)
    weights = [fp8.weight_by_torch(layer, layer.anima_fp8, transposed=False).float() for layer in layers]  # type: ignore[arg-type]
    expected = (values.float() @ torch.cat(weights)) * scales * scale
    torch.testing.assert_close(got, expected.to(torch.bfloat16).float(), rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("together", [True, False])
def test_gradients_through_a_group_equal_the_formula(together: bool) -> None:
    layers = [nf4(), nf4(out_features=64)]
    fp8.enable_fp8(nn.ModuleList(layers), [layers] if together else [[layer] for layer in layers])
    x = torch.randn(1, 30, 192, requires_grad=True)
    pairs = [(torch.randn(8, 192), torch.randn(n, 8)) for n in (128, 64)]
    outputs = fused_lora_linear(x, [Projection(layer, *pair, 0.5) for layer, pair in zip(layers, pairs, strict=True)])
    targets = [torch.randn_like(output) for output in outputs]
    torch.autograd.backward(outputs, targets)
    exact = sum(
        t @ (base_weight(layer, torch.float32) + 0.5 * b @ a)
        for t, layer, (a, b) in zip(targets, layers, pairs, strict=True)
    )
    assert x.grad is not None
    assert 1e-4 < relative(x.grad, exact) < 0.01  # type: ignore[arg-type]  # the update, exact, is most of it


def test_rows_are_taken_once_and_never_after_a_change() -> None:
    tensors = [torch.randn(4, 16), torch.randn(4, 32)]
    rows = fp8.quantize_side_by_side(tensors)
    fp8_rows.attach(tensors, rows)
    assert fp8_rows.take(tensors) is rows
    assert fp8_rows.take(tensors) is None
    for change in (lambda: tensors[1].add_(1), lambda: tensors.reverse(), lambda: tensors.pop()):
        fp8_rows.attach(tensors, rows)
        change()
        assert fp8_rows.take(tensors) is None
    fp8_rows.attach(tensors, rows)
    assert fp8_rows.take([tensors[0] * 1]) is None


def test_the_gradients_of_the_swiglu_product_are_those_of_autograd() -> None:
    gate, up = (torch.randn(2, 7, 48, requires_grad=True) for _ in range(2))
    target = torch.randn(2, 7, 48)
    expected = torch.autograd.grad(nn.functional.silu(gate) * up, (gate, up), target)
    product = fp8_rows.silu_product(gate, up, with_rows=True)
    torch.testing.assert_close(torch.autograd.grad(product, (gate, up), target), expected)


@pytest.mark.parametrize("policy", ["none", "cheap", "1", "all", "cheap/1"])
def test_a_network_takes_the_rows_that_travel_and_computes_the_same_without(
    policy: str, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(
        ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), torch.bfloat16, "test")
    )
    adapted = attach_lora(base, LoraConfig(lora_r=4), dtype=torch.bfloat16, seed=3)
    assert compute_in_fp8(adapted) == []
    network = PackedModel(adapted, policy).train()
    for parameter in lora_b_parameters(network).values():
        nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    row = (ids, torch.arange(40)[None], torch.tensor([0, 40], dtype=torch.int32), (40,))
    wanted = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    found: list[bool] = []
    take = fp8_rows.take

    def watched(tensors: list[torch.Tensor]) -> fp8_rows.Rows | None:
        found.append((rows := take(tensors)) is not None)
        return rows

    def outcome() -> list[torch.Tensor]:
        network.zero_grad()
        hidden = network(*row)
        (hidden * wanted).sum().backward()
        gradients = [parameter.grad for parameter in trainable_parameters(network).values()]
        return [hidden.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]

    monkeypatch.setattr(fp8_rows, "take", watched)
    travelling = outcome()
    layers = len(base.get_decoder().layers)
    again = {"all": layers, "1": 1}.get(policy, 0)
    with torch.no_grad():
        found.clear()
        network(*row)
        assert (found.count(True), found.count(False)) == (3 * layers, layers)  # o_proj's input has none
    found.clear()
    outcome()
    # Backward: those of gate and up come with their rows; those of q, k and v, o and down do not.
    assert found.count(True) == 3 * (layers + again) + layers
    monkeypatch.setattr(fp8_rows, "take", lambda tensors: None)
    for got, expected in zip(travelling, outcome(), strict=True):
        assert torch.equal(got, expected)


def test_fp8_backward_gives_what_bf16_gives_and_rounds_gradients_alone(tiny_llama_dir: Path) -> None:
    def outcome(form: str | None) -> list[torch.Tensor]:
        base = load_base(
            ModelConfig(model_name_or_path=str(tiny_llama_dir)), Compute(torch.device("cpu"), torch.bfloat16, "test")
        )
        adapted = attach_lora(base, LoraConfig(lora_r=4), dtype=torch.bfloat16, seed=3)
        if form is not None:
            assert compute_in_fp8(adapted, forward=form == "fp8") == []
        network = PackedModel(adapted, "cheap").train()
        generator = torch.Generator().manual_seed(2)
        for parameter in lora_b_parameters(network).values():
            nn.init.normal_(parameter, std=0.05, generator=generator)
        ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(0))
        hidden = network(ids, torch.arange(40)[None], torch.tensor([0, 40], dtype=torch.int32), (40,))
        (hidden * torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()).sum().backward()
        gradients = [parameter.grad for parameter in trainable_parameters(network).values()]
        return [hidden.detach(), *(gradient for gradient in gradients if gradient is not None)]

    bf16, backward, everything = outcome(None), outcome("fp8_backward"), outcome("fp8")
    assert torch.equal(bf16[0], backward[0])
    assert not torch.equal(bf16[0], everything[0])
    apart = [
        float(torch.cat([(a - b).flatten() for a, b in zip(bf16[1:], other[1:], strict=True)]).norm())
        for other in (backward, everything)
    ]
    assert 0 < apart[0] < apart[1]


KERNELS = """
import torch
from interpreter import run_in_interpreter
from nf4_layer import nf4 as nf4_layer
from anima.model import fp8, fp8_kernels, fp8_rows, nf4, row_kernels

torch.manual_seed(0)


def same_rows(got, values):
    # The e4m3 of values that are rounded already: the bits of the kernel that only rounds.
    expected = fp8_kernels.quantize_rows(values)
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(got[1], expected[1])


for rows, widths in ((1, (16,)), (5, (48, 16)), (7, (4096, 16, 16)), (3, (4112, 4100, 160)), (2, (17920, 17920))):
    for dtype in (torch.bfloat16, torch.float32):
        parts = [torch.randn(rows, width).to(dtype) * 10.0 ** i for i, width in enumerate(widths)]
        parts[0][0] = 0
        same_rows(fp8_kernels.quantize_side_by_side(parts), torch.cat(parts, dim=1))
        if len(parts) < 3:
            parts[-1][0] = 0
            same_rows(fp8_kernels.quantize_side_by_side(parts), torch.cat(parts, dim=1))
for rows, columns in ((1, 16), (6, 48), (3, 4096), (2, 6656)):
    # Triton's interpreter cuts bf16 off instead of rounding.
    for dtype, near in ((torch.bfloat16, 2**-6), (torch.float32, 1e-5)):
        x, weight, gradient = torch.randn(rows, columns), torch.rand(columns) + 0.5, torch.randn(rows, columns)
        x[0] *= 1e-4
        x, weight, gradient = (t.to(dtype) for t in (x, weight, gradient))
        output, _, inverse_norms, quantised = row_kernels.rms_norm(x, weight, 1e-6, with_rows=True)
        expected = fp8_rows.rms_norm_by_torch(x, weight, 1e-6)
        torch.testing.assert_close(output, expected, rtol=near, atol=1e-6)
        same_rows(quantised, output)
        again, *_ = row_kernels.rms_norm(x, weight, 1e-6, with_rows=False, inverse_norms=inverse_norms)
        assert torch.equal(again, output)
        leaf = x.double().requires_grad_()
        wide = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
        wanted = torch.autograd.grad(wide, leaf, gradient.double())[0]
        got, none = row_kernels.rms_norm_gradient(gradient, x, weight, inverse_norms)
        assert none is None
        residual = torch.randn(rows, columns).to(dtype)
        both, quantised = row_kernels.rms_norm_gradient(
            gradient, x, weight, inverse_norms, residual=residual, with_rows=True
        )
        torch.testing.assert_close(both.double(), wanted + residual.double(), rtol=near, atol=near)
        same_rows(quantised, both)
        normed, total, *rest = row_kernels.rms_norm(x, weight, 1e-6, added=residual, with_rows=True)
        torch.testing.assert_close(total, x + residual, rtol=near, atol=1e-6)
        of_total = row_kernels.rms_norm(total, weight, 1e-6, with_rows=True)
        assert torch.equal(normed, of_total[0])
        assert torch.equal(rest[0], of_total[2])
        same_rows(rest[1], normed)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=near, atol=near * wanted.abs().max().item())
        assert (got.double() - wanted).norm() < near / 2 * wanted.norm()
for rows, columns in ((1, 16), (5, 48), (3, 4096), (2, 4112), (2, 17920)):
    for dtype, near in ((torch.bfloat16, 2**-6), (torch.float32, 1e-5)):
        gate, up, gradient = (torch.randn(rows, columns).to(dtype) * s for s in (3, 1, 0.01))
        gate[0] = 0
        product, quantised = row_kernels.silu_product(gate, up, with_rows=True)
        expected = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(product, expected, rtol=2 * near, atol=1e-6)
        same_rows(quantised, product)
        assert torch.equal(row_kernels.silu_product(gate, up, with_rows=False)[0], product)
        wanted = fp8_rows.silu_gradients_by_torch(gradient, gate, up)
        plain = gate.clone(), up.clone()
        assert row_kernels.silu_gradients_in_place(gradient, *plain, with_rows=False) is None
        quantised = row_kernels.silu_gradients_in_place(gradient, gate, up, with_rows=True)
        for got, same, reference in zip((gate, up), plain, wanted):
            torch.testing.assert_close(got, reference, rtol=near, atol=1e-6)
            assert torch.equal(got, same)
        same_rows(quantised, torch.cat((gate, up), dim=1))
layers = [nf4_layer(192, n) for n in (128, 64, 16)]
scales = fp8._scales(layers)
joined = torch.full((192, 208), 1.0).to(torch.float8_e4m3fn)
for layer, of_layer, part in zip(layers, scales, joined.split([128, 64, 16], dim=1)):
    state = layer.weight.quant_state
    given = dict(inverse_scale=of_layer.inverse, transposed=True)
    nf4.unpack(layer.weight.data, state, torch.float8_e4m3fn, output=part, **given)
    alone = nf4.unpack(layer.weight.data, state, torch.float8_e4m3fn, **given)
    assert torch.equal(part.contiguous().view(torch.uint8), alone.view(torch.uint8))
print("kernels agree")
"""


def test_the_kernels_agree_with_their_reference_in_the_interpreter() -> None:
    run_in_interpreter(KERNELS)
