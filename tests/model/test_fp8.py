"""fp8 products: the arithmetic against fp32, the kernels (in Triton's interpreter) against the arithmetic."""

import pytest
import torch
from interpreter import run_in_interpreter
from nf4_layer import nf4, relative
from torch import nn

from anima.errors import ModelError
from anima.model import fp8
from anima.model.qlora_linear import Projection, base_weight, frozen_linear, fused_lora_linear


def test_rows_use_the_whole_range_and_never_saturate() -> None:
    values = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e4, 1.0, -1e4]])
    rows, scales = fp8.quantize_rows(values)
    assert rows.float().abs().amax(dim=1).tolist() == [448.0, 0.0, 448.0]
    torch.testing.assert_close(
        rows.float() * scales, torch.tensor([[1.0, -2.0, 0.5], [0, 0, 0], [1e4, 0.9766, -1e4]]), rtol=0.04, atol=1e-6
    )


@pytest.mark.parametrize("nested", [True, False])
def test_the_error_of_the_products_is_that_of_e4m3(nested: bool) -> None:
    layer = nf4(nested=nested)
    assert fp8.enable_fp8(nn.ModuleList([layer]), [[layer]]) == []
    x, gradient = torch.randn(2, 50, 192), torch.randn(100, 128)
    weight = base_weight(layer, torch.float32)
    assert (
        0.005
        < relative(fp8.product(fp8.quantize_rows(x.reshape(-1, 192)), layer, x.dtype), x.reshape(-1, 192) @ weight.T)
        < 0.045
    )
    assert 0.005 < relative(fp8.product_transposed([gradient], [layer]), gradient @ weight) < 0.045


def test_the_fused_layer_takes_the_fp8_products_and_keeps_lora_exact() -> None:
    layer = nf4(bias=True)
    x = torch.randn(3, 20, 192, requires_grad=True)
    a, b = torch.randn(8, 192, requires_grad=True), torch.randn(128, 8, requires_grad=True)
    plain = fused_lora_linear(x, [Projection(layer, a, b, 0.5)])[0]
    fp8.enable_fp8(nn.ModuleList([layer]), [[layer]])
    output = fused_lora_linear(x, [Projection(layer, a, b, 0.5)])[0]
    rows, scales = fp8.quantize_rows(x.detach().reshape(-1, 192))
    weight_scales: fp8.WeightScales = layer.anima_fp8  # type: ignore[assignment]
    weight = fp8.weight_by_torch(layer, weight_scales, transposed=False).float() * weight_scales.rows.T
    base = ((rows.float() * scales) @ weight.T).view(3, 20, -1) + layer.bias
    lora = 0.5 * (x @ a.T) @ b.T
    torch.testing.assert_close(output, base + lora, rtol=1e-5, atol=1e-5)
    assert 0 < relative(output, plain) < 0.04
    target = torch.randn_like(output)
    gradients = torch.autograd.grad((output * target).sum(), (x, a, b))
    flat_x, flat = x.detach().reshape(-1, 192), target.reshape(-1, 128)
    expected_x = fp8.product_transposed([flat], [layer]) + 0.5 * (flat @ b) @ a
    torch.testing.assert_close(gradients[0].reshape(-1, 192), expected_x.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], (0.5 * (flat @ b).T @ flat_x).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[2], (0.5 * flat.T @ (flat_x @ a.T)).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_an_update_far_below_the_rounding_of_an_output_is_not_lost(in_fp8: bool) -> None:
    layer = nf4(in_features=64, out_features=64)
    if in_fp8:
        fp8.enable_fp8(nn.ModuleList([layer]), [[layer]])
    x = torch.randn(4000, 64).bfloat16()
    a, b = torch.randn(8, 64).bfloat16(), 1e-5 * torch.randn(64, 8).bfloat16()
    with_update, without = (
        fused_lora_linear(x, [Projection(layer, a, b_weight, 1.0)])[0].float() for b_weight in (b, torch.zeros_like(b))
    )
    update = (x.float() @ a.float().T) @ b.float().T
    assert update.abs().mean() < 2**-9 * without.abs().mean() / 4  # half a unit of the last place: 2^-9 to 2^-8
    kept = float(((with_update - without) * update).sum() / update.square().sum())
    assert abs(kept - 1) < 0.15


def test_a_layer_alone_gives_the_bits_of_one_whose_update_is_zero() -> None:
    layer = nf4(bias=True)
    fp8.enable_fp8(nn.ModuleList([layer]), [[layer]])
    x, a, b = torch.randn(70, 192).bfloat16(), torch.randn(8, 192).bfloat16(), torch.zeros(128, 8).bfloat16()
    assert torch.equal(frozen_linear(x, [layer])[0], fused_lora_linear(x, [Projection(layer, a, b, 2.0)])[0])


def test_an_input_that_several_layers_share_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nf4(), nf4(out_features=64)]
    fp8.enable_fp8(nn.ModuleList(layers), [layers])
    calls = []
    original = fp8.quantize_rows
    monkeypatch.setattr(fp8, "quantize_rows", lambda values: calls.append(1) or original(values))
    x = torch.randn(10, 192)
    a, b = torch.zeros(4, 192), [torch.zeros(128, 4), torch.zeros(64, 4)]
    projections = [Projection(layer, a, b_weight, 1.0) for layer, b_weight in zip(layers, b, strict=True)]
    together = fused_lora_linear(x, projections)
    assert len(calls) == 1
    for one, projection in zip(together, projections, strict=True):
        torch.testing.assert_close(one, fused_lora_linear(x, [projection])[0])
    assert len(calls) == 3


def test_what_fp8_cannot_hold_stays_in_bf16() -> None:
    odd, wild = nf4(in_features=200), nf4()
    wild_weight = torch.randn(128, 192) * 1e-7
    wild_weight[0, 0] = 1.0
    wild.weight = type(wild.weight)(wild_weight, requires_grad=False, quant_type="nf4", compress_statistics=False).to(
        "cpu"
    )
    good = nf4()
    model = nn.ModuleDict({"good": good, "odd": odd, "wild": wild})
    assert fp8.enable_fp8(model, [[good], [odd], [wild]])[0] == "odd"
    assert fp8.uses_fp8(good)
    assert not fp8.uses_fp8(odd)
    plain = nn.Linear(32, 32)
    with pytest.raises(ModelError, match="NF4 base"):
        fp8.enable_fp8(nn.ModuleList([plain]), [[plain]])


KERNELS = """
import torch
from interpreter import run_in_interpreter
from nf4_layer import nf4
from anima.model import fp8, fp8_kernels
from anima.model.nf4 import dequantize, unpack


def same_but_for_ties(got, expected):
    # Triton's interpreter (3.6) forgets the carry where rounding reaches the next power of two: half of it comes out.
    got, expected = got.float(), expected.float()
    carried = (expected == 2 * got) & (torch.frexp(expected.abs())[0] == 0.5)
    same = (got == expected) | carried
    assert same.float().mean() > 0.999, same.float().mean()  # the order of multiplications may tip a tie
    assert carried.float().mean() < 0.2


for columns, rows, nested in ((192, 128, True), (192, 128, False), (320, 80, True), (64, 16, True), (1024, 272, True)):
    layer = nf4(columns, rows, nested=nested)
    scales = fp8._scales([layer])[0]
    for flip in (False, True):
        packed, state = layer.weight.data, layer.weight.quant_state
        got = unpack(packed, state, torch.float8_e4m3fn, inverse_scale=scales.inverse, transposed=flip)
        expected = fp8.weight_by_torch(layer, scales, transposed=flip)
        assert got.shape == expected.shape
        same_but_for_ties(got, expected)
    state.dtype = torch.float32
    assert torch.equal(unpack(packed, state, torch.float32), dequantize(packed, state))
    assert torch.equal(unpack(packed, state, torch.float32, transposed=True), dequantize(packed, state).T)
for rows, columns in ((1, 16), (7, 200), (33, 1024)):
    values = torch.randn(rows, columns)
    values[0] = 0
    got, expected = fp8_kernels.quantize_rows(values), fp8.rows_by_torch(values)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=0)
    same_but_for_ties(got[0], expected[0])
for tokens, outputs, ranks, bias in ((5, 48, 8, True), (130, 144, 64, False), (16, 16, 80, True)):
    raw, row_scales, column_scales = 1e4 * torch.randn(tokens, outputs), torch.rand(tokens, 1), torch.rand(1, outputs)
    left, right = torch.randn(tokens, 2 * ranks)[:, ranks:], torch.randn(outputs, ranks).T
    for update in ((left, right, 3e3), None):
        given = (raw, row_scales, column_scales, torch.randn(outputs) if bias else None, update)
        torch.testing.assert_close(
            fp8_kernels.finish_product(*given, torch.float32), fp8.finished_by_torch(*given), rtol=1e-4, atol=1e-1
        )
print("kernels agree")
"""


def test_the_kernels_agree_with_their_reference_in_the_interpreter() -> None:
    run_in_interpreter(KERNELS)
