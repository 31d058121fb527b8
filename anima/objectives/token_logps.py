"""Log-probabilities of the labels from hidden states, without the table of logits. The ONLY label shift.

Shapes: T tokens of a packed row, N scored tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

import torch
from torch import Tensor

from anima.data.encode import IGNORE_INDEX
from anima.transfer import send

CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in fp32, whatever the vocabulary."""


def scored_positions(labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """Which hidden states are scored, and against which label.

    Labels are unshifted: `labels[t]` is `input_ids[t]` or IGNORE_INDEX. The state at t predicts token t + 1;
    the first label of every packed document is IGNORE_INDEX, so no state is scored across a boundary.

    Args:
        labels_T: int64 (T,).

    Returns:
        positions_N (indices of the states) and targets_N (the tokens they predict).
    """
    positions_N = torch.nonzero(labels_T[1:] != IGNORE_INDEX).squeeze(1)
    return positions_N, labels_T[1:][positions_N]


def token_logps(hidden_TH: Tensor, head_VH: Tensor, labels_T: Tensor) -> Tensor:
    """log p(label) of every scored token, in order; fp32 (N,).

    Differentiable with respect to `hidden_TH`; the head is frozen. The gradient of log-softmax,
    d log p(y) / d h = W[y] - sum_v p(v) W[v], is formed chunk by chunk beside the value and kept as N x H
    numbers, so the backward pass is one multiplication and no logits are kept.

    The labels are best on the host: how many are scored decides shapes, and a device would have to tell.
    """
    positions_N, targets_N = (send(found, hidden_TH.device) for found in scored_positions(labels_T))
    hidden_NH = hidden_TH[positions_N]
    result: Tensor = _ChunkedLogProbs.apply(hidden_NH, head_VH, targets_N)  # type: ignore[no-untyped-call]
    return result


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(h W^T)[y] in chunks of tokens, with its gradient in h."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, hidden_NH: Tensor, head_VH: Tensor, targets_N: Tensor
    ) -> Tensor:
        wants_gradient = hidden_NH.requires_grad
        logps_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        slope_NH = torch.empty_like(hidden_NH) if wants_gradient else None
        chunk = max(1, CHUNK_LOGITS // head_VH.shape[0])
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_CH, targets_C1 = hidden_NH[part], targets_N[part, None]
            logits_CV = (hidden_CH @ head_VH.T).float()
            logps_CV = torch.log_softmax(logits_CV, dim=-1)
            logps_N[part] = logps_CV.gather(1, targets_C1).squeeze(1)
            if slope_NH is not None:
                residual_CV = logps_CV.exp_().neg_()
                residual_CV.scatter_add_(1, targets_C1, torch.ones_like(targets_C1, dtype=torch.float32))
                slope_NH[part] = residual_CV.to(head_VH.dtype) @ head_VH
        if slope_NH is not None:
            ctx.save_for_backward(slope_NH)
        return logps_N

    @staticmethod
    def backward(ctx: torch.autograd.function.BackwardCFunction, gradient_N: Tensor) -> tuple[Tensor, None, None]:
        (slope_NH,) = ctx.saved_tensors
        # Multiplied in fp32 and rounded once, without a product in fp32 between: 6 GiB for 400,000 tokens.
        return torch.mul(gradient_N[:, None], slope_NH, out=torch.empty_like(slope_NH)), None, None
