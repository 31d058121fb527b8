"""Which activations are kept for the backward pass, and which are computed again.

Two means. A whole layer under activation checkpointing keeps only its input. Elsewhere the outputs of norms and of the
SwiGLU product, cheap to make from what is kept anyway, carry a recipe; a layer that would keep them keeps the recipe.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Recipe = Callable[[], Tensor]
_ATTRIBUTE = "anima_recipe"


def with_recipe(tensor: Tensor, recipe: Recipe) -> Tensor:
    """`tensor`, marked as one that `recipe` makes again, bit by bit."""
    if torch.is_grad_enabled():
        setattr(tensor, _ATTRIBUTE, recipe)
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """How to make `tensor` again; None if it has to be kept."""
    return getattr(tensor, _ATTRIBUTE, None)


def num_recomputed_layers(policy: str, num_layers: int) -> int:
    """Layers that are recomputed as a whole: all of them, none, or the first N."""
    if policy.isdigit():
        return min(int(policy), num_layers)
    return num_layers if policy == "all" else 0


def apply_policy(model: PreTrainedModel, policy: str) -> None:
    """Set a model up for all | cheap | none | N (the first N layers as a whole, the cheap parts of the others).

    Args:
        model: A transformers model whose decoder has `layers`.
        policy: As in `--recompute`.
    """
    layers = list(model.get_decoder().layers)
    whole = num_recomputed_layers(policy, len(layers))
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
                module.recompute_output = policy != "none" and index >= whole


class CheapToRecompute(nn.Module):
    """A layer whose output need not be kept when its inputs are."""

    recompute_output = False
