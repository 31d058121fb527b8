"""Attention that keeps the documents of a packed row apart.

On GPUs torch's own variable-length flash attention, or our kernels where documents are short; elsewhere a loop over the
documents with the same result.
Registered with transformers under `IMPLEMENTATION`; the boundaries travel as keyword arguments of the forward pass.
"""

import functools
import inspect
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from anima.model.shared_keys import SharedKeys, with_shared

IMPLEMENTATION = "anima_packed"
FLASH_COMPUTE_CAPABILITY = (8, 0)
FLASH_MAX_HEAD_DIM = 256
SHORT = 2048
"""Longest document up to which our kernels were faster than flash attention: 1.8 times at 200 tokens, 1.4 at 1,024, 1.3
at 2,048 (forward and backward, 52 heads of 128, H200)."""
SHORT_COMPUTE_CAPABILITY = (9, 0)
"""The GPUs on which that was measured."""
SHORT_HEAD_DIMS = (64, 128)
FLASH_KNOWS_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Grouped heads without repeating keys and values: from torch 2.12 on."""
_log = logging.getLogger(__name__)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seqlens: Tensor | None = None,
    document_lengths: Sequence[int] | None = None,
    shared_prompts: SharedKeys | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each document of a packed row.

    Args:
        module: The attention layer (unused; part of transformers' signature).
        query: (1, heads, T, head_dim).
        key: (1, key_value_heads, T, head_dim).
        value: (1, key_value_heads, T, head_dim).
        attention_mask: Must be None: the boundaries say it all.
        dropout: Must be 0: a frozen base has no use for it.
        scaling: Factor of the scores; None for 1/sqrt(head_dim).
        sliding_window: A token sees itself and this many minus one before it; None for all of its document.
        cu_seqlens: int32 (documents + 1,), cumulative document lengths on the device.
        document_lengths: The lengths on the host; they sum to T.
        shared_prompts: Which documents go on from the beginning of the document before them; None if none does.
        _: Arguments that transformers hands to every attention function and that do not matter here.

    Returns:
        (1, T, heads, head_dim) and None (no attention weights).
    """
    if attention_mask is not None or dropout or cu_seqlens is None or document_lengths is None:
        raise ValueError("packed attention takes document boundaries and neither a mask nor dropout")
    queries = keys = _Borders(cu_seqlens, document_lengths)
    if shared_prompts is not None:
        key, value = with_shared(key, shared_prompts), with_shared(value, shared_prompts)
        seen = [own + more for own, more in zip(document_lengths, shared_prompts.lengths, strict=True)]
        keys = _Borders(shared_prompts.cu_seqlens, seen)
    if uses_flash(query.device, query.dtype, query.shape[-1]):
        if queries is keys and is_short(query, document_lengths, sliding_window):
            return _short(query, key, value, scaling, queries.cu_seqlens), None
        return _flash(query, key, value, scaling, sliding_window, queries, keys), None
    split = (
        query.split(list(queries.lengths), 2),
        key.split(list(keys.lengths), 2),
        value.split(list(keys.lengths), 2),
    )
    pieces = [_causal(*document, scaling, sliding_window) for document in zip(*split, strict=True)]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


class _Borders(NamedTuple):
    """Borders of the documents: cumulative on the device, as lengths on the host."""

    cu_seqlens: Tensor
    lengths: Sequence[int]


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    window: int | None,
    queries: _Borders,
    keys: _Borders,
) -> Tensor:
    """All documents in one kernel; arguments and result as in `packed_attention`.

    A document's last query sees its last key: flash attention counts causality and windows from there.
    """
    if key.shape[1] != query.shape[1] and not FLASH_KNOWS_GROUPS:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    grouped: Any = {"enable_gqa": key.shape[1] != query.shape[1]} if FLASH_KNOWS_GROUPS else {}
    output = varlen_attn(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        queries.cu_seqlens,
        keys.cu_seqlens,
        max(queries.lengths),
        max(keys.lengths),
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        **grouped,
    )
    return cast(Tensor, output).unsqueeze(0)


def is_short(query: Tensor, lengths: Sequence[int], window: int | None) -> bool:
    """Whether our kernels take documents of these lengths: where they were seen to be faster."""
    longest = max(lengths)
    fits = longest <= SHORT and (window is None or window >= longest)
    return fits and serves_short(query.device, query.shape[-1])


@functools.cache
def serves_short(device: torch.device, head_dim: int) -> bool:
    """Whether our kernels are used on this device at all: where they were measured, and if they agree there with flash
    attention. Ask for the first time outside of a forward pass, whose hooks would see the tensors of this question.
    """
    if device.type != "cuda" or head_dim not in SHORT_HEAD_DIMS:
        return False
    if torch.cuda.get_device_capability(device) != SHORT_COMPUTE_CAPABILITY:
        return False
    generator, lengths = torch.Generator().manual_seed(0), (70, 1, 130)
    borders = _Borders(torch.tensor([0, 70, 71, 201], dtype=torch.int32, device=device), lengths)
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value, target = (
            torch.randn(1, heads, 201, head_dim, generator=generator).to(device, torch.bfloat16).requires_grad_()
            for heads in (4, 2, 2, 4)
        )
        outputs = (
            _short(query, key, value, None, borders.cu_seqlens),
            _flash(query, key, value, None, None, borders, borders),
        )
        ours, theirs = (
            (output, *torch.autograd.grad(output, (query, key, value), target.detach().transpose(1, 2)))
            for output in outputs
        )
    pairs = [(mine.float(), other.float()) for mine, other in zip(ours, theirs, strict=True)]
    if all(bool((mine - other).norm() < 2e-2 * other.norm()) for mine, other in pairs):
        return True
    _log.warning("our attention kernels differ from flash attention on this GPU: using that, which is slower")
    return False


def _short(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, cu_seqlens: Tensor) -> Tensor:
    from anima.model.attention_kernels import short_attention

    queries, keys, values = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return short_attention(queries, keys, values, cu_seqlens, scaling or query.shape[-1] ** -0.5).unsqueeze(0)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of one document, (1, heads, queries, head_dim): its queries are those of its last keys."""
    length = key.shape[2]
    earlier = length - query.shape[2]
    grouped = key.shape[1] != query.shape[1]
    if not earlier and (window is None or window >= length):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    position = torch.arange(length, device=query.device)
    distance = position[earlier:, None] - position[None, :]
    mask = (distance >= 0) & (distance < (window or length))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def uses_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether packed rows go through variable-length flash attention here, or through the loop."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim <= FLASH_MAX_HEAD_DIM
        and head_dim % 8 == 0
        and torch.cuda.get_device_capability(device) >= FLASH_COMPUTE_CAPABILITY
    )


AttentionInterface.register(IMPLEMENTATION, packed_attention)
