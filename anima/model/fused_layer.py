"""A decoder layer in fp8 whose sums and norms are one pass each, forward and backward.

transformers' own adds what a block gives to the stream of hidden states, and norms it in a second pass; its backward
pass norms, adds, and rounds to e4m3 for the block before in three. Which layers these are, and what goes in between,
stays with transformers' classes: only the order of their pieces is written down again.
"""

from functools import cache
from typing import Any

from torch import Tensor, nn

from anima.model.kernels import RmsNorm, RotaryAttention, SwiGlu, in_fp8

LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer")


def fuse_sums(model: nn.Module) -> int:
    """Let the layers of a decoder, whose blocks and norms are ours and compute in fp8, add and norm in one pass.

    Returns:
        How many do so.
    """
    before: Any = None
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ in LAYERS and _is_ours(module)]
    for layer in layers:
        layer.input_layernorm.gives_gradient_rows = before is not None and in_fp8(before.mlp.down_proj)
        layer.post_attention_layernorm.gives_gradient_rows = in_fp8(layer.self_attn.o_proj)
        kind: Any = type(layer)
        layer.__class__ = _fused(kind)
        before = layer
    return len(layers)


def _is_ours(layer: Any) -> bool:  # noqa: ANN401
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    blocks = isinstance(layer.self_attn, RotaryAttention) and isinstance(layer.mlp, SwiGlu)
    return blocks and all(isinstance(norm, RmsNorm) for norm in norms) and all(map(in_fp8, _readers(layer)))


def _readers(layer: Any) -> list[nn.Module]:  # noqa: ANN401
    """The projections that read a norm."""
    return [getattr(block, name) for block in (layer.self_attn, layer.mlp) for name in block.same_input]


@cache
def _fused(kind: Any) -> Any:  # noqa: ANN401
    """The same class with another forward pass; as a class, since transformers wraps those for checkpointing."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
        """(batch, T, hidden) to the same shape; what else comes is for the attention."""
        stream, normed = self.input_layernorm.of_sum(hidden_states, None)
        output, _ = self.self_attn(hidden_states=normed, **kwargs)
        stream, normed = self.post_attention_layernorm.of_sum(stream, output)
        summed: Tensor = stream + self.mlp(normed)
        return summed

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})
