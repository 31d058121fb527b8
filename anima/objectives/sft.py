"""Supervised fine-tuning: the mean negative log-likelihood of the supervised tokens."""

import torch

from anima.data.batching import MicroBatch
from anima.objectives.objective import MetricSum, ObjectiveOutput, Policy
from anima.objectives.token_logps import token_logps


class SupervisedFineTuning:
    """-sum log p(token | prefix) over the supervised tokens; a step divides by their number over all ranks."""

    name = "sft"

    def weight(self, batch: MicroBatch) -> int:
        """Scored tokens of the micro-batch; 0 for a filler."""
        return batch.num_scored

    def __call__(self, policy: Policy, batch: MicroBatch) -> ObjectiveOutput:
        """Loss of one micro-batch; differentiable even where nothing is scored (a filler gives zero)."""
        hidden_TH = policy(batch)
        logps_N = token_logps(hidden_TH, policy.head_weight, batch.labels.squeeze(0))
        loss_sum = -logps_N.sum() if logps_N.numel() else hidden_TH.sum() * 0.0
        count = torch.full((), float(batch.num_scored), device=logps_N.device)
        return ObjectiveOutput(loss_sum, {"loss": MetricSum(loss_sum.detach().float(), count)})
