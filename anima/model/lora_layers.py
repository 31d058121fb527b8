"""LoRA layers whose forward pass is ours, while PEFT keeps owning parameters, names and files."""

from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import Linear4bit as Lora4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from anima.model.qlora_linear import frozen_linear, fused_lora_linear


class FusedLoraLayer:
    """Forward pass of a LoRA layer through `fused_lora_linear`; PEFT keeps owning parameters, names and files.

    Whatever the fused function does not know (adapters switched off, several active, merged, variants such as
    DoRA) takes PEFT's own forward pass.
    """

    @property
    def base(self) -> nn.Linear:
        """The frozen layer."""
        return cast(nn.Linear, cast(LoraLayer, self).get_base_layer())

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """The layer's output, (…, out)."""
        layer = cast(LoraLayer, self)
        names = layer.active_adapters
        ours = not (layer.merged or args or kwargs)
        if ours and layer.disable_adapters and not torch.is_grad_enabled():
            return frozen_linear(x, self.base).view(*x.shape[:-1], -1)  # a reference computes as the policy does
        simple = len(names) == 1 and names[0] in layer.lora_A and names[0] not in layer.lora_variant
        if not (ours and simple) or layer.disable_adapters:
            return cast(Tensor, super().forward(x, *args, **kwargs))  # type: ignore[misc]
        name = names[0]
        a_weight = cast(nn.Linear, layer.lora_A[name]).weight
        b_weight = cast(nn.Linear, layer.lora_B[name]).weight
        x = x.to(a_weight.dtype)
        dropout = layer.lora_dropout[name]
        dropped = None if isinstance(dropout, nn.Identity) or not cast(nn.Module, self).training else dropout(x)
        return fused_lora_linear(x, self.base, a_weight, b_weight, layer.scaling[name], dropped)


class FusedLora4bit(FusedLoraLayer, Lora4bit):  # type: ignore[misc]  # peft makes it only where bitsandbytes is
    """LoRA on an NF4 layer."""


class FusedLora16bit(FusedLoraLayer, LoraLinear):
    """LoRA on a 16- or 32-bit layer."""
