"""Losses over pairs of a chosen and a rejected answer: pure functions of sequence log-probabilities.

Shapes: B pairs. logps are sums of token log-probabilities over one answer (nats, <= 0); every loss is per pair, (B,).
pi is the policy, ref the reference, w the chosen and l the rejected answer; sigma is the logistic function.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from anima.config.preference import PreferenceConfig


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of both answers of each pair under one model, each (B,)."""

    chosen: Tensor
    rejected: Tensor


def margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """h = [log pi(w) - log ref(w)] - [log pi(l) - log ref(l)], (B,): eq. 7 of Rafailov et al. 2023 without beta."""
    return (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)


def sigmoid_loss(margin_B: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -log sigma(beta h); Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With label_smoothing e the cDPO of Mitchell 2023: -(1 - e) log sigma(beta h) - e log sigma(-beta h).
    """
    scaled_B = beta * margin_B
    return -(1 - label_smoothing) * F.logsigmoid(scaled_B) - label_smoothing * F.logsigmoid(-scaled_B)


def robust_loss(margin_B: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, unbiased if a share e of the labels is wrong; Chowdhury et al. 2024 (arXiv 2403.00409).

    [-(1 - e) log sigma(beta h) + e log sigma(-beta h)] / (1 - 2 e)
    """
    scaled_B = beta * margin_B
    kept_B = (1 - label_smoothing) * F.logsigmoid(scaled_B)
    return (label_smoothing * F.logsigmoid(-scaled_B) - kept_B) / (1 - 2 * label_smoothing)


def ipo_loss(margin_B: Tensor, *, beta: float) -> Tensor:
    """IPO: (h - 1 / (2 beta))^2; Azar et al. 2023 (arXiv 2310.12036), eq. 17 with tau = beta.

    As printed, h is a difference of sums; TRL, which asked the authors, divides by the answers' tokens
    (`length_normalize`).
    """
    return (margin_B - 1 / (2 * beta)).square()


def hinge_loss(margin_B: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - beta h): SLiC's rank loss (Zhao et al. 2023, arXiv 2305.10425) on the margin of DPO."""
    return F.relu(1 - beta * margin_B)


def simpo_loss(mean_logps: PairLogps, *, beta: float, gamma: float) -> Tensor:
    """SimPO: -log sigma(beta log pi(w) / |w| - beta log pi(l) / |l| - gamma).

    Meng et al. 2024 (arXiv 2405.14734), eq. 6.

    Args:
        mean_logps: Log-probabilities of the policy divided by the answer's tokens.
        beta: Scale of the reward.
        gamma: Reward margin asked for.
    """
    return -F.logsigmoid(beta * (mean_logps.chosen - mean_logps.rejected) - gamma)


def orpo_loss(mean_logps: PairLogps, *, beta: float) -> Tensor:
    """ORPO: -log pi(w) / |w| - beta log sigma(log odds(w) - log odds(l)).

    Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7, with lambda = beta;
    odds(y) = p / (1 - p) with p = exp(log pi(y) / |y|), so log odds = log p - log(1 - p).
    """
    ratio_B = _log_odds(mean_logps.chosen) - _log_odds(mean_logps.rejected)
    return -mean_logps.chosen - beta * F.logsigmoid(ratio_B)


def _log_odds(mean_logp_B: Tensor) -> Tensor:
    below_B = mean_logp_B.clamp(max=-1e-6)  # an answer of probability 1 has infinite odds
    return below_B - torch.log(-torch.expm1(below_B))


def pair_losses(config: PreferenceConfig, policy: PairLogps, reference: PairLogps, answer_tokens: PairLogps) -> Tensor:
    """The loss that the config asks for, (B,), without the SFT term.

    Args:
        config: Loss and its numbers.
        policy: Differentiable sums of the policy.
        reference: Sums of the reference; zeros for --reference none.
        answer_tokens: Scored tokens of both answers, as floats.
    """
    if config.loss_type in ("simpo", "orpo"):
        means = per_token(policy, answer_tokens)
        if config.loss_type == "simpo":
            return simpo_loss(means, beta=config.beta, gamma=config.simpo_gamma)
        return orpo_loss(means, beta=config.beta)
    if config.length_normalize:
        policy, reference = per_token(policy, answer_tokens), per_token(reference, answer_tokens)
    margin_B = margin(policy, reference)
    if config.loss_type == "ipo":
        return ipo_loss(margin_B, beta=config.beta)
    if config.loss_type == "hinge":
        return hinge_loss(margin_B, beta=config.beta)
    if config.loss_type == "robust":
        return robust_loss(margin_B, beta=config.beta, label_smoothing=config.label_smoothing)
    return sigmoid_loss(margin_B, beta=config.beta, label_smoothing=config.label_smoothing)


def per_token(logps: PairLogps, answer_tokens: PairLogps) -> PairLogps:
    """Sums divided by the answers' tokens."""
    return PairLogps(logps.chosen / answer_tokens.chosen, logps.rejected / answer_tokens.rejected)


def sft_losses(policy: PairLogps, answer_tokens: PairLogps) -> Tensor:
    """-log pi(w) / |w|, (B,): the term that RPO adds; Pang et al. 2024 (arXiv 2404.19733), eq. 1."""
    return -policy.chosen / answer_tokens.chosen


def rewards(config: PreferenceConfig, policy: PairLogps, reference: PairLogps, answer_tokens: PairLogps) -> PairLogps:
    """Implicit rewards beta (log pi - log ref), Rafailov et al. 2023, section 5; of means where the loss uses them."""
    if config.length_normalize or config.loss_type in ("simpo", "orpo"):
        policy, reference = per_token(policy, answer_tokens), per_token(reference, answer_tokens)
    return PairLogps(
        config.beta * (policy.chosen - reference.chosen), config.beta * (policy.rejected - reference.rejected)
    )


def sum_by_document(token_logps_N: Tensor, answer_tokens_D: Tensor) -> Tensor:
    """Sequence log-probabilities (D,): the sum over the scored tokens of each document.

    Args:
        token_logps_N: Log-probabilities of all scored tokens of a packed row, in order.
        answer_tokens_D: How many of them each document has, int64.
    """
    documents = answer_tokens_D.numel()
    document_N = torch.repeat_interleave(
        torch.arange(documents, device=token_logps_N.device), answer_tokens_D, output_size=token_logps_N.numel()
    )
    return token_logps_N.new_zeros(documents).index_add(0, document_N, token_logps_N)
