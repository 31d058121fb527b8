"""Preference optimisation: the mean loss over pairs of a chosen and a rejected answer, with its metrics.

The reference's log-probabilities arrive with the batch; whose they are is unknown here.
"""

import torch
from torch import Tensor

from anima.config.preference import PreferenceConfig
from anima.data.batching import PairMicroBatch
from anima.objectives.dpo import PairLogps, pair_losses, per_token, rewards, sft_losses, sum_by_document
from anima.objectives.objective import MetricSum, ObjectiveOutput, Policy
from anima.objectives.token_logps import token_logps


class PreferenceOptimization:
    """One of the losses of `objectives/dpo.py`, plus sft_weight times the chosen answer's mean NLL; per pair."""

    name = "dpo"

    def __init__(self, config: PreferenceConfig) -> None:
        """Choose the loss and its numbers."""
        self._config = config

    def weight(self, batch: PairMicroBatch) -> int:
        """Pairs of the micro-batch; 0 for a filler."""
        return batch.num_examples

    def __call__(self, policy: Policy, batch: PairMicroBatch) -> ObjectiveOutput:
        """Loss of one micro-batch; differentiable even without pairs (a filler gives zero).

        Raises:
            ValueError: the loss needs a reference and the batch brings none.
        """
        config, tokens = self._config, answer_tokens(batch)
        hidden_TH = policy(batch)
        logps = _sums(hidden_TH, policy.head_weight, batch)
        reference = reference_logps(batch)
        if config.needs_reference and reference is None:
            raise ValueError("the batch brings no log-probabilities of the reference")
        compared = reference or PairLogps(torch.zeros_like(logps.chosen), torch.zeros_like(logps.rejected))
        losses_B = pair_losses(config, logps, compared, tokens)
        if config.sft_weight:
            losses_B = losses_B + config.sft_weight * sft_losses(logps, tokens)
        loss_sum = losses_B.sum() if batch.num_examples else hidden_TH.sum() * 0.0
        with torch.no_grad():
            metrics = self._metrics(losses_B, logps, reference, rewards(config, logps, compared, tokens), tokens)
        return ObjectiveOutput(loss_sum, metrics)

    def _metrics(
        self,
        losses_B: Tensor,
        logps: PairLogps,
        reference: PairLogps | None,
        implicit: PairLogps,
        tokens: PairLogps,
    ) -> dict[str, MetricSum]:
        margins_B = implicit.chosen - implicit.rejected
        won_B = (margins_B > 0).float()
        shorter_B = (tokens.chosen < tokens.rejected).float()
        values = {
            "loss": losses_B,
            "rewards/chosen": implicit.chosen,
            "rewards/rejected": implicit.rejected,
            "rewards/margins": margins_B,
            "rewards/accuracies": won_B,
            "logps/chosen": logps.chosen,
            "logps/rejected": logps.rejected,
            "answer_tokens/chosen": tokens.chosen,
            "answer_tokens/rejected": tokens.rejected,
        }
        if self._config.sft_weight:
            values["nll/chosen"] = sft_losses(logps, tokens)
        if reference is not None:
            values["kl"] = kl_estimate(logps, reference, tokens)
        count = losses_B.new_full((), float(losses_B.numel()))
        metrics = {name: MetricSum(value_B.sum(), count) for name, value_B in values.items()}
        # Where the chosen answer is the shorter one, a policy that only prefers length is wrong.
        metrics["rewards/accuracies_chosen_shorter"] = MetricSum((won_B * shorter_B).sum(), shorter_B.sum())
        return metrics


def pair_logps(policy: Policy, batch: PairMicroBatch) -> PairLogps:
    """Log-probabilities of both answers of each pair under the policy; fp32."""
    return _sums(policy(batch), policy.head_weight, batch)


def answer_tokens(batch: PairMicroBatch) -> PairLogps:
    """Scored tokens of both answers of each pair, as floats."""
    counts_B2 = batch.answer_tokens.view(-1, 2).float()
    return PairLogps(counts_B2[:, 0], counts_B2[:, 1])


def reference_logps(batch: PairMicroBatch) -> PairLogps | None:
    """What the batch brings of the reference."""
    known_B2 = batch.reference_logps
    return None if known_B2 is None else PairLogps(known_B2[:, 0], known_B2[:, 1])


def kl_estimate(policy: PairLogps, reference: PairLogps, tokens: PairLogps) -> Tensor:
    """How far the policy is from the reference on these answers, nats a token, (B,); 0 if they agree, never negative.

    The k3 estimator of KL(reference || policy), r - 1 - log r (Schulman 2020, "Approximating KL divergence"), with
    log r the mean over an answer's tokens of log policy - log reference; by Jensen's inequality not more than the mean
    over single tokens. The answers are those of the data, drawn from neither model: a gauge, not the divergence.
    """
    mean_policy, mean_reference = per_token(policy, tokens), per_token(reference, tokens)
    ratios_2B = torch.stack(
        (mean_policy.chosen - mean_reference.chosen, mean_policy.rejected - mean_reference.rejected)
    )
    return (torch.expm1(ratios_2B) - ratios_2B).mean(dim=0)


def _sums(hidden_TH: Tensor, head_VH: Tensor, batch: PairMicroBatch) -> PairLogps:
    logps_N = token_logps(hidden_TH, head_VH, batch.labels.squeeze(0))
    sums_B2 = sum_by_document(logps_N, batch.answer_tokens).view(-1, 2)
    return PairLogps(sums_B2[:, 0], sums_B2[:, 1])
