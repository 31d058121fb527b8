"""LoRA layers whose forward pass is ours, while PEFT keeps owning parameters, names and files."""

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as Lora4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from anima.model.qlora_linear import Projection, frozen_linear, fused_lora_linear


class FusedLoraLayer:
    """Forward pass of a LoRA layer through `fused_lora_linear`; PEFT keeps owning parameters, names and files.

    Whatever the fused function does not know (adapters switched off while gradients are wanted, several active,
    merged, variants such as DoRA) takes PEFT's own forward pass.
    """

    @property
    def base(self) -> nn.Linear:
        """The frozen layer."""
        return cast(nn.Linear, cast(LoraLayer, self).get_base_layer())

    @property
    def switched_off(self) -> bool:
        """Whether only the frozen layer counts, and nobody asks for gradients: the pass of a reference."""
        layer = cast(LoraLayer, self)
        return layer.disable_adapters and not layer.merged and not torch.is_grad_enabled()

    @property
    def projection(self) -> Projection | None:
        """The layer as the fused function takes it; None for what it does not know."""
        layer = cast(LoraLayer, self)
        names = layer.active_adapters
        simple = len(names) == 1 and names[0] in layer.lora_A and names[0] not in layer.lora_variant
        if layer.merged or layer.disable_adapters or not simple:
            return None
        a_linear, b_linear = (cast(nn.Linear, pair[names[0]]) for pair in (layer.lora_A, layer.lora_B))
        return Projection(self.base, a_linear.weight, b_linear.weight, layer.scaling[names[0]])

    @property
    def dropout(self) -> nn.Module | None:
        """LoRA dropout where it is in force."""
        layer = cast(LoraLayer, self)
        dropout = layer.lora_dropout[layer.active_adapters[0]]
        return dropout if cast(nn.Module, self).training and not isinstance(dropout, nn.Identity) else None

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The layer's output, (…, out)."""
        if not (args or kwargs):
            if self.switched_off:
                return frozen_linear(x, [self.base])[0].view(*x.shape[:-1], -1)  # computes as the policy does
            if projection := self.projection:
                x = x.to(projection.a_weight.dtype)
                dropped = None if self.dropout is None else self.dropout(x)
                return fused_lora_linear(x, [projection], dropped)[0]
        return cast(Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]


class FusedLora4bit(FusedLoraLayer, Lora4bit):  # type: ignore[misc]  # peft makes it only where bitsandbytes is
    """LoRA on an NF4 layer."""


class FusedLora16bit(FusedLoraLayer, LoraLinear):
    """LoRA on a 16- or 32-bit layer."""


def project(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor]:
    """The outputs of linear layers that read the same input, together where they are all fused LoRA layers."""
    fused = [layer for layer in layers if isinstance(layer, FusedLoraLayer)]
    if len(fused) == len(layers):
        if all(layer.switched_off for layer in fused):
            return [y.view(*x.shape[:-1], -1) for y in frozen_linear(x, [layer.base for layer in fused])]
        projections = [layer.projection for layer in fused]
        known = [projection for projection in projections if projection is not None]
        if len(known) == len(fused) and not any(layer.dropout for layer in fused):
            return fused_lora_linear(x.to(known[0].a_weight.dtype), known)
    return [layer(x) for layer in layers]
