"""On a GPU: what fp8 fuses against the separate steps, and a network with and without travelling rows."""

from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def close(got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    difference = (got.double() - expected.double()).norm() / expected.double().norm()
    assert difference < bound, float(difference)


@pytest.mark.parametrize("tokens", [1, 777])
@pytest.mark.parametrize(
    "widths", [(6656, 6656, 6656), (8192, 1024, 1024), (17920, 17920), (576, 192, 192), (1536, 48)]
)
def test_matrices_side_by_side_get_the_bits_of_one(tokens: int, widths: tuple[int, ...]) -> None:
    from anima.model import fp8_kernels

    parts = [torch.randn(tokens, width, device="cuda").bfloat16() * 10.0**i for i, width in enumerate(widths)]
    same_rows(fp8_kernels.quantize_side_by_side(parts), torch.cat(parts, dim=1))


def same_rows(got: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> None:
    from anima.model import fp8_kernels

    expected = fp8_kernels.quantize_rows(values)
    assert torch.equal(got[0].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize(("hidden", "width"), [(6656, 17920), (576, 1536), (8192, 28672), (4096, 4112)])
def test_norm_and_product_with_rows_equal_those_without(hidden: int, width: int) -> None:
    from anima.model import fp8_rows, kernels, row_kernels

    x, target = torch.randn(2, 1, 300, hidden, device="cuda").bfloat16().unbind()
    weight = (torch.rand(hidden, device="cuda") + 0.5).bfloat16()
    gate, up, gradient = torch.randn(3, 1, 300, width, device="cuda").bfloat16().unbind()
    results: list[list[torch.Tensor]] = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate, up)]
        if ours:
            _, norm, inverse_norms = fp8_rows.sum_and_norm(leaves[0], None, weight, 1e-6, with_rows=True)
            product = fp8_rows.silu_product(leaves[1], leaves[2], with_rows=True, with_gradient_rows=True)
            for output in (norm, product):
                rows = fp8_rows.take((output,))
                assert rows is not None
                same_rows(rows, output.detach()[0])
            assert torch.equal(fp8_rows.norm_again(x, weight, inverse_norms, epsilon=1e-6), norm.detach())
            assert torch.equal(row_kernels.silu_product(gate[0], up[0], with_rows=False)[0], product.detach()[0])
        else:
            norm, product = kernels.rms_norm(leaves[0], weight, 1e-6), kernels.silu_product(leaves[1], leaves[2])
        results.append([norm.detach(), product.detach()])
        results[-1] += torch.autograd.grad(norm, leaves[:1], target)
        of_gate, of_up = torch.autograd.grad(product, leaves[1:], gradient)
        if ours:
            rows = fp8_rows.take((of_gate, of_up))
            assert rows is not None
            same_rows(rows, torch.cat((of_gate[0], of_up[0]), dim=1))
        results[-1] += [of_gate, of_up]
    for got, expected in zip(*results, strict=True):
        close(got, expected, 5e-3)


@pytest.mark.parametrize("ranks", [1, 16, 64, 200])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_with_its_update_equals_the_reference(
    ranks: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anima.model import cublaslt, fp8, fp8_kernels

    if torch.cuda.get_device_capability() == cublaslt.HOPPER:
        assert cublaslt.serves(torch.device("cuda", 0))
    for tokens, out, width in ((1, 16, 16), (7, 320, 6656), (301, 6656, 640), (4097, 1072, 176)):
        x, weight = (torch.randn(rows, width, device="cuda").bfloat16() for rows in (tokens, out))
        rows, (columns, column_scales) = fp8.quantize_rows(x), fp8.quantize_rows(weight)
        bias = torch.randn(out, device="cuda").bfloat16() if biased else None
        left, right = (torch.randn(n, ranks, device="cuda").bfloat16() / 8 for n in (tokens, out))
        given = (rows[1], column_scales.T.contiguous(), bias)
        expected = fp8.finished_by_torch(rows[0].double() @ columns.double().T, *given, (left, right.T, 0.5))
        alone = fp8.finished_by_torch(rows[0].double() @ columns.double().T, *given, None)
        for serves in (cublaslt.serves, lambda _: False):
            with monkeypatch.context() as patch:
                patch.setattr(cublaslt, "serves", serves)
                arguments = (rows, columns, given[1], bias)
                close(fp8_kernels.product(*arguments, (left, right.T, 0.5), torch.bfloat16), expected, 4e-3)
                close(fp8_kernels.product(*arguments, None, torch.bfloat16), alone, 4e-3)
                nothing = (torch.zeros_like(left), right.T, 0.5)
                same = fp8_kernels.product(*arguments, nothing, torch.bfloat16)
                assert torch.equal(same, fp8_kernels.product(*arguments, None, torch.bfloat16))


@pytest.mark.parametrize("library", [True, False])
def test_the_check_at_the_start_passes_with_the_library_and_without(
    library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes as bnb

    from anima.model import cublaslt, fp8

    if not library:
        monkeypatch.setattr(cublaslt, "serves", lambda _: False)
    base = bnb.nn.Linear4bit(640, 320, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    base.load_state_dict({"weight": torch.randn(320, 640) * 0.02})
    base = base.cuda().requires_grad_(False)
    assert fp8.enable_fp8(torch.nn.ModuleList([base]), [[base]]) == []


def test_products_of_more_shapes_than_are_remembered() -> None:
    from anima.model import cublaslt, fp8_kernels

    if torch.cuda.get_device_capability() != cublaslt.HOPPER:
        pytest.skip("needs a GPU of Hopper's kind")
    weight = torch.randn(64, 64, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.rand(1, 64, device="cuda")
    for tokens in (*range(1, 600), *range(1, 9)):
        values, row_scales = fp8_kernels.quantize_rows(torch.randn(tokens, 64, device="cuda").bfloat16())
        onto = torch.zeros(tokens, 64, device="cuda", dtype=torch.bfloat16)
        cublaslt.add_product(onto, values, row_scales, weight, scales)
        close(onto, values.float() @ weight.float().T * row_scales * scales, 4e-3)


def test_the_gradient_of_a_group_is_the_sum_of_separate_ones() -> None:
    import bitsandbytes as bnb

    from anima.model import fp8
    from anima.model.qlora_linear import base_weight

    layers = []
    for width in (17920, 17920):
        base = bnb.nn.Linear4bit(6656, width, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        base.load_state_dict({"weight": torch.randn(width, 6656) * 0.02})
        layers.append(base.cuda().requires_grad_(False))
    fp8.enable_fp8(torch.nn.ModuleList(layers), [layers])
    assert fp8.share_scale(layers)
    gradients = [torch.randn(512, 17920, device="cuda").bfloat16() for _ in layers]
    exact = sum(
        g.float() @ base_weight(layer, torch.bfloat16).float() for g, layer in zip(gradients, layers, strict=True)
    )
    apart = sum(fp8.product_transposed([g], [layer]) for g, layer in zip(gradients, layers, strict=True))
    together = fp8.product_transposed(gradients, layers)
    errors = [float((found.float() - exact).norm() / exact.norm()) for found in (apart, together)]  # type: ignore[union-attr]
    # A sum over 35,840 products in the matrix units, which add up with few bits, must not be worse than two of 17,920.
    assert errors[1] < 1.1 * errors[0] < 0.05, errors


@pytest.mark.parametrize("policy", ["none", "cheap", "1", "all", "cheap/1"])
def test_a_network_in_fp8_computes_the_same_with_and_without_travelling_rows(
    policy: str, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anima.config.schema import LoraConfig, ModelConfig
    from anima.model import fp8_rows
    from anima.model.base_model import load_base
    from anima.model.compute import Compute
    from anima.model.lora import attach_lora, compute_in_fp8, lora_b_parameters, trainable_parameters
    from anima.model.packed import PackedModel

    compute = Compute(torch.device("cuda"), torch.bfloat16, "test")
    adapted = attach_lora(
        load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), compute),
        LoraConfig(lora_r=16),
        dtype=torch.bfloat16,
        seed=3,
    )
    compute_in_fp8(adapted)
    network = PackedModel(adapted, policy).cuda().train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 200, (1, 128), device="cuda")
    boundaries = torch.tensor([0, 128], dtype=torch.int32, device="cuda")
    wanted = torch.randn(128, 64, device="cuda").bfloat16()

    def outcome() -> list[torch.Tensor]:
        network.zero_grad()
        hidden = network(ids, torch.arange(128, device="cuda")[None], boundaries, (128,))
        (hidden * wanted).sum().backward()
        gradients = [parameter.grad for parameter in trainable_parameters(network).values()]
        return [hidden.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]

    first = outcome()
    monkeypatch.setattr(fp8_rows, "take", lambda tensors: None)
    for got, expected in zip(first, outcome(), strict=True):
        assert torch.isfinite(got).all()
        close(got, expected, 1e-2)  # attention's backward pass adds in any order
