"""Next-token logits of a batch whose cache has its final size from the start, so that every step has the same shapes.

Owns the buffers that a step reads: tokens, positions, mask and transformers' static cache. Knows nothing of how tokens
are chosen.
"""

import logging
from functools import cache
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache, StaticLayer

from anima.free_memory import free_host_memory
from anima.model.kernels import RotaryAttention
from anima.model.replay import Recorder, ReplayedStep

_log = logging.getLogger(__name__)

CACHE_MULTIPLE = 64
"""Lengths of a cache are rounded up to it: rows of a mask begin where attention kernels can read them."""
CACHE_SHARE = 0.5
"""Of the free memory, at most, for a cache of full size; a growing one takes only what is used."""


def cache_length(num_tokens: int) -> int:
    """Length of a cache for so many tokens."""
    return -(-num_tokens // CACHE_MULTIPLE) * CACHE_MULTIPLE


def can_decode(model: PreTrainedModel, rows: int, length: int) -> bool:
    """Whether `FixedDecoder` knows the model, and its cache takes no more than half of the free memory.

    The model must have our attention in every layer (so all that a step computes is known), see the whole cache in each
    (a sliding window is counted on the host, which a recording would not do again), and be set up as `generating` does.

    Args:
        model: In a state to generate.
        rows: Sequences of a batch.
        length: Tokens that each of them can have.
    """
    config = model.config.get_text_config(decoder=True)
    attentions = [module for module in model.modules() if isinstance(module, RotaryAttention)]
    if len(attentions) != config.num_hidden_layers or config._attn_implementation != "sdpa":
        return False
    if any(type(layer) is not StaticLayer for layer in StaticCache(config, max_cache_len=length).layers):
        return False
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = 2 * len(attentions) * rows * heads * length * attentions[0].head_dim * model.dtype.itemsize
    fits = bool(size <= CACHE_SHARE * _free_bytes(model.device))
    if not fits:
        _say_slow(rows)
    return fits


@cache
def _say_slow(rows: int) -> None:
    """Once for a number of rows: whoever waits can ask for shorter answers, or fewer at a time."""
    _log.warning(
        "answers to %d prompts at a time come more slowly: a cache of full length takes over half of the free memory",
        rows,
    )


def _free_bytes(device: torch.device) -> int:
    """Memory that this process can still take on a device."""
    if device.type != "cuda":
        return free_host_memory().size
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - held
    return min(free, allowed) + held - torch.cuda.memory_allocated(device)


class FixedDecoder:
    """A batch under way."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        *,
        length: int,
        recorder: Recorder,
    ) -> None:
        """Make the buffers; `close` frees what was recorded.

        Args:
            model: One that `can_decode` takes.
            input_ids: The prompts, (rows, T).
            attention_mask: (rows, T), 1 for a token of a prompt and 0 for padding, which is on the left; None for no
                padding.
            position_ids: (rows, T) or (1, T).
            length: Of the cache, at least all tokens that will ever be read.
            recorder: What records a step.
        """
        rows, self._read = input_ids.shape
        self._model = model
        self._cache = StaticCache(model.config, max_cache_len=length)
        self._visible = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=input_ids.device)
        self._visible[:, 0, 0, : self._read] = True if attention_mask is None else attention_mask.bool()
        self._prompt = (input_ids, attention_mask, position_ids)
        self._positions = position_ids[:, -1:].expand(rows, 1).clone()
        self._tokens = torch.zeros_like(self._positions)
        self._step = ReplayedStep(self._forward, self._rewind, recorder)

    def prompt(self) -> Tensor:
        """Read the prompts; logits of the first new token, (rows, vocabulary)."""
        return self._logits(*self._prompt)

    def next(self, tokens: Tensor) -> Tensor:
        """Read one more token of every row, (rows,); logits of the one behind it, valid until the next call."""
        self._tokens.copy_(tokens[:, None])
        self._positions.add_(1)
        self._visible[..., self._read] = True
        logits = self._step()
        self._read += 1
        return logits

    def close(self) -> None:
        """Free what was recorded; no more calls."""
        self._step.close()
        del self._step  # it knows this object: without it the cache is free at once, not when cycles are collected

    def _forward(self) -> Tensor:
        """The step: reads and writes buffers alone, and asks nothing of the host."""
        return self._logits(self._tokens, self._visible, self._positions)

    def _logits(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        output = self._model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _rewind(self) -> None:
        """The cache as it was before a step that broke off within: layers count their tokens on the device."""
        for layer in cast(list[StaticLayer], self._cache.layers):
            layer.cumulative_length.fill_(self._read)
