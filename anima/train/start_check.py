"""Before the first step the policy is its reference: measured, logged, and refused if it is not so.

A wrong reference (the base instead of the adapter that training starts from is the classic) changes what rewards, KL
and beta mean, and no curve shows it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anima import distributed
from anima.config.preference import PreferenceConfig
from anima.data.batching import PairMicroBatch
from anima.errors import TrainingError
from anima.objectives.dpo import PairLogps, pair_losses
from anima.objectives.preference import answer_tokens, pair_logps, reference_logps
from anima.train.engine import Engine


@dataclass(frozen=True)
class Tolerance:
    """What rounding may do between two passes over the same pair in differently packed rows.

    Rounding errors of tokens are independent, so their sum over an answer grows with the root of its length; a wrong
    reference moves every token the same way.

    Attributes:
        offset: Of a sequence's log-probability, nats.
        per_root_token: The same, per root of its tokens.
        loss: Of the mean loss, at a beta of 0.1.
    """

    offset: float
    per_root_token: float
    loss: float


TOLERANCES = {torch.float32: Tolerance(1e-2, 1e-3, 5e-4), torch.bfloat16: Tolerance(0.5, 0.2, 0.05)}


def check_start(
    engine: Engine,
    config: PreferenceConfig,
    micro_batches: Sequence[PairMicroBatch],
    dtype: torch.dtype,
    *,
    must_be_equal: bool,
) -> dict[str, float]:
    """Compare policy and reference on the first step's pairs, without dropout.

    A collective.

    Args:
        engine: The policy before its first step.
        config: The loss.
        micro_batches: This rank's part of the first step.
        dtype: Number format of the computation.
        must_be_equal: Whether both are the same model; otherwise the difference is only reported.

    Returns:
        Largest difference of an answer's log-probability, and the mean loss over all ranks.

    Raises:
        TrainingError: they must be equal and are not.
    """
    tolerance = TOLERANCES[dtype]
    gaps, over, losses, expected = [0.0], [-math.inf], 0.0, 0.0
    pairs = 0
    engine.eval_mode()
    with torch.no_grad():
        for batch in micro_batches:
            there = batch.to(engine.device)
            known = reference_logps(there)
            policy = pair_logps(engine, there)
            if known is None or not batch.num_examples:
                continue
            tokens = answer_tokens(there)
            gap = torch.cat(((policy.chosen - known.chosen).abs(), (policy.rejected - known.rejected).abs()))
            allowed = tolerance.offset + tolerance.per_root_token * torch.cat((tokens.chosen, tokens.rejected)).sqrt()
            gaps.append(float(gap.max()))
            over.append(float((gap - allowed).max()))
            losses += float(_losses(config, policy, known, tokens))
            expected += float(_losses(config, known, known, tokens))
            pairs += batch.num_examples
    engine.train_mode()
    everywhere = distributed.gather_objects((max(gaps), max(over), losses, expected, pairs))
    worst, worst_over = max(x[0] for x in everywhere), max(x[1] for x in everywhere)
    total = sum(x[4] for x in everywhere)
    loss, wanted = sum(x[2] for x in everywhere) / total, sum(x[3] for x in everywhere) / total
    loss_tolerance = tolerance.loss * max(1.0, config.beta / 0.1) * max(1.0, wanted)
    if must_be_equal and (worst_over > 0 or abs(loss - wanted) > loss_tolerance):
        raise TrainingError(
            "before its first step the policy is not its reference",
            where=f"{total} pairs of the first step",
            got=f"log-probabilities differ by up to {worst:.3f} nats, loss {loss:.6f}",
            allowed=f"the same log-probabilities up to rounding, loss {wanted:.6f} (± {loss_tolerance:g})",
            fix="empty --reference_cache_dir; if it stays so, the model computes otherwise in training: report it",
        )
    return {"start/max_logp_gap": worst, "start/loss": loss}


def _losses(config: PreferenceConfig, policy: PairLogps, reference: PairLogps, tokens: PairLogps) -> torch.Tensor:
    return pair_losses(config, policy, reference, tokens).sum()
