"""Which activations are kept for the backward pass, where, and which are computed again.

Two means. A whole layer under activation checkpointing keeps only its input. Elsewhere the outputs of norms and of the
SwiGLU product, cheap to make from what is kept anyway, carry a recipe; a layer that would keep them keeps its sources.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from anima.config.policy import parse_policy
from anima.model.host_memory import HostMemory
from anima.model.offload import HostOffload, spread

_ATTRIBUTE = "anima_recipe"
_OFFLOAD = "anima_offload"
_HOST_MEMORY = "anima_host_memory"


@dataclass(frozen=True)
class Recipe:
    """How to make a tensor again, bit by bit: function(*sources)."""

    function: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def with_recipe(tensor: Tensor, function: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """`tensor`, marked as one that function(*sources) makes again without a graph."""
    if torch.is_grad_enabled():
        setattr(tensor, _ATTRIBUTE, Recipe(function, tuple(source.detach() for source in sources)))
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How to make `tensor` again; None if it has to be kept."""
    return getattr(tensor, _ATTRIBUTE, None)


def apply_policy(model: PreTrainedModel, policy: str) -> None:
    """Set a model up for all | cheap | none | N (the first N layers as a whole, the cheap parts of the others) | …/M.

    Args:
        model: A transformers model whose decoder has `layers`.
        policy: As in `--recompute`; behind a slash, how many layers send what they keep to host memory.
    """
    recompute, offloaded = parse_policy(policy)
    decoder = model.get_decoder()
    layers = list(decoder.layers)
    whole = min(int(recompute), len(layers)) if recompute.isdecimal() else len(layers) * (recompute == "all")
    if whole:
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(options)
        else:  # the name before transformers 5.23
            model.gradient_checkpointing_enable(options)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < whole
        for module in layer.modules():
            if isinstance(module, CheapToRecompute):
                module.recompute_output = recompute != "none" and index >= whole
    if previous := getattr(decoder, _OFFLOAD, None):
        previous.remove()
    others = [layers[index] for index in spread(whole, len(layers), offloaded)]
    inputs = [layers[index] for index in spread(0, whole, offloaded - len(others))]
    setattr(decoder, _OFFLOAD, HostOffload(inputs, others, _host_memory(decoder)) if inputs or others else None)


def _host_memory(decoder: nn.Module) -> HostMemory:
    """The decoder's own, for all policies."""
    memory: HostMemory | None = getattr(decoder, _HOST_MEMORY, None)
    if memory is None:
        memory = HostMemory()
        setattr(decoder, _HOST_MEMORY, memory)
    return memory


def host_memory_held(model: PreTrainedModel) -> int:
    """Bytes that are pinned for activations already; any policy may use them."""
    memory = getattr(model.get_decoder(), _HOST_MEMORY, None)
    return 0 if memory is None else memory.held_bytes


def host_memory_refusal(network: nn.Module) -> str | None:
    """Why the host had no room for activations when they last wanted some; None if it had."""
    memories = (getattr(module, _HOST_MEMORY, None) for module in network.modules())
    return next((memory.refusal for memory in memories if memory is not None), None)


class CheapToRecompute(nn.Module):
    """A layer whose output need not be kept when its inputs are."""

    recompute_output = False
