"""The fused layer against its formula in float64 under autograd, and against PEFT's own layer."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from anima.config.schema import LoraConfig
from anima.model.lora import FusedLora4bit, FusedLora16bit, peft_config
from anima.model.qlora_linear import Projection, base_weight, fused_lora_linear


def nf4(layer: nn.Linear) -> bnb.nn.Linear4bit:
    """The layer in NF4 with double quantisation."""
    quantized = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
    )
    quantized.load_state_dict(layer.state_dict())
    quantized.support_avx512bf16_for_cpu = False  # as load_base does: no repacking in eval mode
    return quantized.to("cpu")


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("drop", [False, True])
def test_output_and_gradients_equal_the_formula(quantize: bool, bias: bool, drop: bool) -> None:
    torch.manual_seed(0)
    base: nn.Linear = nn.Linear(128, 64, bias=bias)
    if quantize:
        base = nf4(base)
    base.requires_grad_(False)
    x = torch.randn(2, 7, 128, requires_grad=True)
    a, b = (torch.randn(shape, requires_grad=True) for shape in ((8, 128), (64, 8)))
    keep = (torch.rand(2, 7, 128) > 0.3) / 0.7
    target = torch.randn(2, 7, 64)

    output = fused_lora_linear(x, [Projection(base, a, b, 0.25)], x * keep if drop else None)[0]
    (output * target).sum().backward()
    got = [output.detach(), x.grad, a.grad, b.grad]

    x64, a64, b64 = (t.detach().double().requires_grad_(True) for t in (x, a, b))
    weight = base_weight(base, torch.float32).double()
    expected = x64 @ weight.T + 0.25 * ((x64 * keep.double() if drop else x64) @ a64.T) @ b64.T
    if bias:
        expected = expected + base.bias.double()
    (expected * target.double()).sum().backward()
    for one, other in zip(got, [expected.detach(), x64.grad, a64.grad, b64.grad], strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", [False, True])
def test_peft_builds_our_layers_and_they_equal_its_own(quantize: bool) -> None:
    import peft

    def model(fused: bool) -> nn.Module:
        torch.manual_seed(1)
        inner: nn.Linear = nn.Linear(128, 64)
        network = nn.Sequential(nf4(inner) if quantize else inner)
        ours = peft_config(LoraConfig(lora_r=8, lora_dropout=0.5), ["0"])
        ours.task_type = None
        if not fused:
            ours._custom_modules = None
        torch.manual_seed(2)
        adapted = peft.get_peft_model(network, ours, autocast_adapter_dtype=False)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return adapted

    fused, reference = model(True), model(False)
    layers = [module for module in fused.modules() if isinstance(module, FusedLora4bit | FusedLora16bit)]
    assert len(layers) == 1
    x = torch.randn(5, 128)
    for mode in ("train", "eval", "disabled"):
        outputs = []
        for network in (fused, reference):
            network.train(mode == "train")
            torch.manual_seed(3)  # the same dropout
            if mode == "disabled":
                with network.disable_adapter():  # type: ignore[operator]
                    outputs.append(network(x))
            else:
                outputs.append(network(x))
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_one_input_is_kept_once_and_no_weight_at_all() -> None:
    """What autograd keeps for three layers that share an input: that input and r numbers a token each."""
    base = [nf4(nn.Linear(128, 64, bias=False)).requires_grad_(False) for _ in range(3)]
    pairs = [(torch.randn(8, 128, requires_grad=True), torch.randn(64, 8, requires_grad=True)) for _ in range(3)]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[0] == 1000:  # not the parameters
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1000, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        projections = [Projection(layer, a, b, 1.0) for layer, (a, b) in zip(base, pairs, strict=True)]
        outputs = [fused_lora_linear(x, [projection])[0] for projection in projections]
    assert len(outputs) == 3
    assert sum(kept.values()) == 4 * (1000 * 128 + 3 * 1000 * 8)


@pytest.mark.parametrize("quantize", [False, True])
def test_layers_of_one_input_together_equal_them_alone(quantize: bool) -> None:
    torch.manual_seed(4)
    x = torch.randn(3, 5, 128, requires_grad=True)
    projections = []
    for out, rank, scaling in ((64, 8, 0.25), (32, 4, 2.0), (64, 8, 1.0)):
        base: nn.Linear = nn.Linear(128, out)
        pair = torch.randn(rank, 128, requires_grad=True), torch.randn(out, rank, requires_grad=True)
        projections.append(Projection((nf4(base) if quantize else base).requires_grad_(False), *pair, scaling))
    leaves = [x, *(w for p in projections for w in (p.a_weight, p.b_weight))]
    together = fused_lora_linear(x, projections)
    alone = [fused_lora_linear(x, [projection])[0] for projection in projections]
    targets = [torch.randn_like(output) for output in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    results = [
        torch.autograd.grad(sum((y * t).sum() for y, t in zip(outputs, targets, strict=True)), leaves)
        for outputs in (together, alone)
    ]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
