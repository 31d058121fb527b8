"""A frozen NF4 layer on the CPU, and how far a tensor is from another."""

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn


def nf4(in_features: int = 192, out_features: int = 128, *, nested: bool = True, bias: bool = False) -> Linear4bit:
    """Random weights, frozen; the same ones for the same shape."""
    torch.manual_seed(0)
    layer = Linear4bit(
        in_features,
        out_features,
        bias=bias,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type="nf4",
    )
    layer.load_state_dict(nn.Linear(in_features, out_features, bias=bias).state_dict())
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu").requires_grad_(False)


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())
