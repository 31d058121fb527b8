"""RMSNorm, rotary attention and the SwiGLU block: Liger's fused kernels on GPUs, the same formulas in torch elsewhere.

The modules take the place of transformers' own; parameters, their names and the linear layers inside stay.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Cache, PreTrainedConfig, PreTrainedModel

from anima.model import fp8, fp8_rows
from anima.model.lora_layers import FusedLoraLayer, project
from anima.model.recompute import CheapToRecompute, with_recipe

try:
    from liger_kernel.ops import LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction
except ImportError:  # only where the gpu extra is installed
    LigerRMSNormFunction = LigerRopeFunction = LigerSiLUMulFunction = None

NORMS = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")
MLPS = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")
LONG_PRODUCT, PIECE_PRODUCT = 2**30, 2**28
"""Numbers in the SwiGLU product: above the first (2 GiB in bf16; a backward pass has six of that size) the block runs
in pieces of the second, which keep a GPU busy and take 3 GiB in a backward pass, whatever the length."""
READERS = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
"""Norms, and the blocks that alone read what they give."""
ATTENTIONS = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention", "MistralAttention")


def uses_liger(device: torch.device) -> bool:
    """Whether Liger's kernels run on this device."""
    return LigerRMSNormFunction is not None and device.type == "cuda"


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last axis (Zhang & Sennrich 2019, eq. 4), by Liger or as `fp8_rows.rms_norm_by_torch` says."""
    if uses_liger(x.device):
        output: Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False, None)
        return output
    return fp8_rows.rms_norm_by_torch(x, weight, epsilon)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, eq. 6)."""
    if uses_liger(gate.device):
        output: Tensor = LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)
        return output
    return F.silu(gate) * up


def rotate(query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions (Su et al. 2021, eq. 34; halves of a head are rotated against each other, as in Llama).

    Args:
        query: (batch, heads, T, head_dim); on a GPU it is overwritten, for nobody else reads it.
        key: (batch, key_value_heads, T, head_dim); likewise.
        cosine: (batch or 1, T, head_dim).
        sine: The same shape.
    """
    if uses_liger(query.device):
        rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(query, key, cosine, sine)
        return rotated
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    return query * cosine + _half_turn(query) * sine, key * cosine + _half_turn(key) * sine


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class RmsNorm(CheapToRecompute):
    """RMSNorm over the last axis."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        """Take over a norm's weight, (hidden,)."""
        super().__init__()
        self.weight = weight
        self.epsilon = epsilon
        self.gives_rows = self.gives_gradient_rows = False
        """Whether the output carries its rows of e4m3, since it goes into products in fp8 and nowhere else; and the
        gradient of the input, since it comes to one."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, hidden) to the same shape."""
        if self.gives_rows:
            return self.of_sum(x, None)[1]
        output = rms_norm(x, self.weight, self.epsilon)
        if self.recompute_output and self.training:
            return with_recipe(output, partial(rms_norm, epsilon=self.epsilon), x, self.weight)
        return output

    def of_sum(self, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + added and its norm in one pass: `fp8_rows.sum_and_norm`."""
        total, output, inverse_norms = fp8_rows.sum_and_norm(
            x,
            added,
            self.weight,
            self.epsilon,
            with_rows=self.gives_rows,
            with_gradient_rows=self.gives_gradient_rows,
        )
        if self.recompute_output and self.training:
            again = partial(fp8_rows.norm_again, inverse_norms=inverse_norms, epsilon=self.epsilon)
            output = with_recipe(output, again, total, self.weight)
        return total, output


class RotaryAttention(nn.Module):
    """Self-attention with rotary positions: transformers' own in all but the rotation."""

    is_causal = True
    same_input = ("q_proj", "k_proj", "v_proj")
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, attention: nn.Module) -> None:
        """Take over the linear layers of transformers' attention under their names, and its norms of heads."""
        super().__init__()
        self.config = cast(PreTrainedConfig, attention.config)
        self.layer_idx = cast(int, attention.layer_idx)
        self.head_dim = cast(int, attention.head_dim)
        self.num_key_value_groups = cast(int, attention.num_key_value_groups)
        self.scaling = cast(float, attention.scaling)
        self.sliding_window = _sliding_window(attention)
        self.norms_heads = hasattr(attention, "q_norm")
        for name, child in attention.named_children():
            setattr(self, name, child)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,  # what a decoder layer hands through to the attention function
    ) -> tuple[Tensor, Tensor | None]:
        """(batch, T, hidden) to the same shape, and the attention weights where the function gives them."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projected = project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = (states.view(heads) for states in projected)
        if self.norms_heads:
            query, key = self.q_norm(query), self.k_norm(key)  # type: ignore[operator]
        value = value.transpose(1, 2)
        query, key = rotate(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = AttentionInterface()[self.config._attn_implementation]
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def _sliding_window(attention: nn.Module) -> int | None:
    """Tokens that a layer sees; None for all. Mistral has one window for all layers, in its config."""
    if type(attention).__name__ == "MistralAttention":
        return cast(int | None, getattr(attention.config, "sliding_window", None))
    return cast(int | None, getattr(attention, "sliding_window", None))


class SwiGlu(CheapToRecompute):
    """down(silu(gate(x)) * up(x))."""

    same_input = ("gate_proj", "up_proj")

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        """Take over the three linear layers under their names."""
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.width = cast(int, gate_proj.out_features)
        self.gives_rows = self.gives_gradient_rows = False
        """Whether the product, and the gradients of its factors, carry their rows of e4m3."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, T, hidden) to the same shape. Very long rows in pieces of tokens, each recomputed in its backward pass,
        so that the wide tensors of one piece exist at a time; gradients of the weights add up over the pieces.
        """
        if x.numel() // x.shape[-1] * self.width <= LONG_PRODUCT:
            return self._block(x)
        pieces = x.split(max(1, PIECE_PRODUCT // self.width), dim=-2)
        return torch.cat(
            [cast(Tensor, checkpoint(self._block, piece, use_reentrant=False)) for piece in pieces], dim=-2
        )

    def _block(self, x: Tensor) -> Tensor:
        gate, up = project(x, (self.gate_proj, self.up_proj))
        again: Callable[[Tensor, Tensor], Tensor] = silu_product
        if self.gives_rows or self.gives_gradient_rows:
            again = fp8_rows.silu_product
            rows = {"with_rows": self.gives_rows, "with_gradient_rows": self.gives_gradient_rows}
            product = fp8_rows.silu_product(gate, up, **rows)
        else:
            product = silu_product(gate, up)
        if self.recompute_output and self.training:
            product = with_recipe(product, again, gate, up)
        output: Tensor = self.down_proj(product)
        return output


def install_kernels(model: PreTrainedModel) -> int:
    """Put our modules in place of the decoder's norms, attentions and MLPs where they compute the same.

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
            elif kind in ATTENTIONS and not child.attention_dropout:
                setattr(parent, name, RotaryAttention(child))
            elif kind in MLPS and gated_by_silu:
                setattr(parent, name, SwiGlu(child.gate_proj, child.up_proj, child.down_proj))
            else:
                continue
            replaced += 1
    return replaced


def fused_layers(model: nn.Module) -> list[list[FusedLoraLayer]]:
    """All fused LoRA layers; those that our attentions and SwiGLU blocks let read the same input together."""
    groups = []
    for module in model.modules():
        if isinstance(module, RotaryAttention | SwiGlu):
            members = [getattr(module, name) for name in module.same_input]
            if all(isinstance(layer, FusedLoraLayer) for layer in members):
                groups.append(members)
    grouped = {id(layer) for group in groups for layer in group}
    every = [module for module in model.modules() if isinstance(module, FusedLoraLayer)]
    return groups + [[layer] for layer in every if id(layer) not in grouped]


def hand_rows_on(model: nn.Module) -> None:
    """Let norms and SwiGLU blocks give what only products in fp8 read in e4m3 as well."""
    for module in model.modules():
        for norm, reader in ((getattr(module, a, None), getattr(module, b, None)) for a, b in READERS):
            if isinstance(norm, RmsNorm) and isinstance(reader, RotaryAttention | SwiGlu):
                norm.gives_rows = all(_forward_in_fp8(getattr(reader, name)) for name in reader.same_input)
        if isinstance(module, SwiGlu):
            factors = [getattr(module, name) for name in module.same_input]
            module.gives_rows = _forward_in_fp8(module.down_proj)
            module.gives_gradient_rows = all(map(in_fp8, factors)) and fp8.share_scale([f.base for f in factors])
    norms = [module for module in model.modules() if isinstance(module, RmsNorm)]
    blocks = [module for module in model.modules() if isinstance(module, SwiGlu)]
    if norms and any(block.gives_rows or block.gives_gradient_rows for block in blocks):
        fp8_rows.check_kernels(norms[0].weight, blocks[0].width)


def in_fp8(layer: nn.Module) -> bool:
    """Whether a projection computes its products with gradients in fp8, and so reads their rows of e4m3."""
    return isinstance(layer, FusedLoraLayer) and fp8.uses_fp8(layer.base)


def _forward_in_fp8(layer: nn.Module) -> bool:
    return isinstance(layer, FusedLoraLayer) and fp8.forward_uses_fp8(layer.base)
