"""RMSNorm and the SwiGLU block: Liger's fused kernels on GPUs, the same formulas in torch elsewhere.

The modules take the place of transformers' own; parameters, their names and the linear layers inside stay.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from anima.model.recompute import CheapToRecompute, with_recipe

try:
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
except ImportError:  # only where the gpu extra is installed
    LigerRMSNormFunction = LigerSiLUMulFunction = None

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")


def uses_liger(device: torch.device) -> bool:
    """Whether Liger's kernels run on this device."""
    return LigerRMSNormFunction is not None and device.type == "cuda"


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, in fp32 inside (Zhang & Sennrich 2019, eq. 4)."""
    if uses_liger(x.device):
        output: Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False, None)
        return output
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6)."""
    if uses_liger(gate.device):
        output: Tensor = LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)
        return output
    return F.silu(gate) * up


class RmsNorm(CheapToRecompute):
    """RMSNorm over the last axis."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        """Take over a norm's weight, (hidden,)."""
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) to the same shape."""
        output = rms_norm(x, self.weight, self.epsilon)
        if self.recompute_output and self.training:
            return with_recipe(
                output, partial(_without_graph, rms_norm, x.detach(), self.weight.detach(), self.epsilon)
            )
        return output


class SwiGlu(CheapToRecompute):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        """Take over the three linear layers under their names."""
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) to the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        product = silu_product(gate, up)
        if self.recompute_output and self.training:
            product = with_recipe(product, partial(_without_graph, silu_product, gate.detach(), up.detach()))
        output: Tensor = self.down_proj(product)
        return output


def _without_graph(function: object, *inputs: object) -> Tensor:
    with torch.no_grad():
        return function(*inputs)  # type: ignore[operator, no-any-return]


def install_kernels(model: PreTrainedModel) -> int:
    """Put our modules in place of the decoder's norms and MLPs where they compute the same.

    Returns:
        How many were replaced; 0 for an architecture that we do not know.
    """
    decoder = model.get_decoder()
    gated_by_silu = getattr(model.config, "hidden_act", None) in ("silu", "swish")
    replaced = 0
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in NORMS and name not in ("q_norm", "k_norm"):
                setattr(parent, name, RmsNorm(child.weight, child.variance_epsilon))
            elif kind in MLPS and gated_by_silu:
                setattr(parent, name, SwiGlu(child.gate_proj, child.up_proj, child.down_proj))
            else:
                continue
            replaced += 1
    return replaced
