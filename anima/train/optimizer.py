"""The client optimizer that DeepSpeed shards: bitsandbytes' paged 8-bit AdamW unless another is asked for."""

from collections.abc import Iterable

import bitsandbytes as bnb
import torch
from torch import nn

from anima.config.schema import OptimizationConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizationConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the adapter.

    On a CPU the paged class runs unpaged, with real 8-bit states.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    trained = list(parameters)
    if config.optimizer == "adamw_torch":
        return torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
        )
    kind = bnb.optim.PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        trained, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    return optimizer
