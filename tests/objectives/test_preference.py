"""The objective over packed pairs: its numbers against the plain definition, its metrics by hand, its fillers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from anima.config.preference import PreferenceConfig
from anima.data.batching import PairMicroBatch, collate_pairs, pair_filler
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.objectives.dpo import PairLogps
from anima.objectives.preference import PreferenceOptimization, kl_estimate, pair_logps

VOCABULARY, HIDDEN = 11, 6


class ToyPolicy:
    """Hidden states that depend on a token and its place; differentiable in its table."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
        self.places = torch.randn(32, HIDDEN, generator=generator)
        self.head_weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)

    def __call__(self, batch: Any) -> Tensor:
        return self.table[batch.input_ids[0]] + self.places[batch.position_ids[0]]

    def logp(self, side: TokenSequence) -> Tensor:
        """The definition, one sequence at a time."""
        ids = torch.from_numpy(side.input_ids.astype(np.int64))
        table = torch.log_softmax((self.table[ids] + self.places[: len(ids)]) @ self.head_weight.T, dim=-1)
        scored = torch.from_numpy(side.labels[1:] != IGNORE_INDEX)
        return table[:-1].gather(1, ids[1:, None])[:, 0][scored].sum()


def pairs(seed: int = 1) -> list[tuple[TokenSequence, TokenSequence]]:
    """Three pairs with prompts of 2 to 4 tokens and answers of 1 to 6; in the second the chosen answer is shorter."""
    generator = np.random.default_rng(seed)

    def side(prompt: Any, length: int) -> TokenSequence:
        answer = generator.integers(0, VOCABULARY, length)
        ids = np.concatenate([prompt, answer]).astype(np.int32)
        labels = ids.copy()
        labels[: len(prompt)] = IGNORE_INDEX
        return TokenSequence(ids, labels)

    made = []
    for prompt_length, chosen, rejected in ((2, 6, 3), (4, 1, 5), (3, 4, 2)):
        prompt = generator.integers(0, VOCABULARY, prompt_length)
        made.append((side(prompt, chosen), side(prompt, rejected)))
    return made


REFERENCE = torch.tensor([[-14.0, -7.0], [-2.5, -12.0], [-9.0, -6.0]])


def batch(reference: Tensor | None = REFERENCE) -> PairMicroBatch:
    return collate_pairs(pairs(), reference)


def test_log_probabilities_are_those_of_each_sequence_alone() -> None:
    policy = ToyPolicy()
    found = pair_logps(policy, batch())
    expected = [[policy.logp(side).item() for side in pair] for pair in pairs()]
    assert torch.stack((found.chosen, found.rejected), 1).tolist() == pytest.approx(np.array(expected), abs=1e-5)


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_the_loss_and_its_gradient_are_those_of_the_formula(sft_weight: float) -> None:
    policy = ToyPolicy()
    output = PreferenceOptimization(PreferenceConfig(beta=0.2, sft_weight=sft_weight))(policy, batch())
    output.loss_sum.backward()
    assert policy.table.grad is not None
    got = policy.table.grad.clone()

    plain = ToyPolicy()
    total = torch.zeros(())
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(pairs(), REFERENCE, strict=True):
        pc, pr = plain.logp(chosen), plain.logp(rejected)
        total = total - torch.log(torch.sigmoid(0.2 * ((pc - ref_chosen) - (pr - ref_rejected))))
        total = total - sft_weight * pc / int((chosen.labels != IGNORE_INDEX).sum())
    total.backward()
    assert output.loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert plain.table.grad is not None
    torch.testing.assert_close(got, plain.table.grad, rtol=1e-4, atol=1e-5)


def test_metrics_by_hand() -> None:
    policy = ToyPolicy()
    sums = pair_logps(policy, batch())
    metrics = PreferenceOptimization(PreferenceConfig(beta=0.2))(policy, batch()).metrics
    means = {name: float(m.total / m.count) for name, m in metrics.items()}
    chosen = [0.2 * (p + r) for p, r in zip(sums.chosen.tolist(), (14.0, 2.5, 9.0), strict=True)]
    rejected = [0.2 * (p + r) for p, r in zip(sums.rejected.tolist(), (7.0, 12.0, 6.0), strict=True)]
    won = [c > r for c, r in zip(chosen, rejected, strict=True)]
    assert means["rewards/chosen"] == pytest.approx(sum(chosen) / 3, rel=1e-5)
    assert means["rewards/rejected"] == pytest.approx(sum(rejected) / 3, rel=1e-5)
    assert means["rewards/margins"] == pytest.approx((sum(chosen) - sum(rejected)) / 3, rel=1e-4)
    assert means["rewards/accuracies"] == pytest.approx(sum(won) / 3)
    assert metrics["rewards/accuracies_chosen_shorter"].count == 1
    assert means["rewards/accuracies_chosen_shorter"] == float(won[1])
    assert (means["answer_tokens/chosen"], means["answer_tokens/rejected"]) == pytest.approx((11 / 3, 10 / 3))
    assert means["logps/chosen"] == pytest.approx(sums.chosen.mean().item())
    assert means["kl"] > 0
    assert all(not metric.total.requires_grad for metric in metrics.values())


def test_the_kl_gauge_by_hand() -> None:
    # One answer of 2 tokens, log-ratio ln 2 a token: 2 - 1 - ln 2; the other agrees: 0.
    policy = PairLogps(torch.tensor([-4.0 + 2 * math.log(2)]), torch.tensor([-3.0]))
    reference = PairLogps(torch.tensor([-4.0]), torch.tensor([-3.0]))
    tokens = PairLogps(torch.tensor([2.0]), torch.tensor([5.0]))
    assert kl_estimate(policy, reference, tokens).item() == pytest.approx((1 - math.log(2)) / 2)


@pytest.mark.parametrize("config", [PreferenceConfig(), PreferenceConfig(sft_weight=0.1)])
def test_a_filler_weighs_nothing_and_names_the_same_metrics(config: PreferenceConfig) -> None:
    policy, objective = ToyPolicy(), PreferenceOptimization(config)
    empty = pair_filler(pairs()[0][0], with_reference=True)
    output = objective(policy, empty)
    output.loss_sum.backward()
    assert policy.table.grad is not None
    assert policy.table.grad.abs().max() == 0
    assert (objective.weight(empty), objective.weight(batch())) == (0, 3)
    assert output.metrics.keys() == objective(policy, batch()).metrics.keys()
    assert all(float(m.total) == float(m.count) == 0 for m in output.metrics.values())


def test_a_missing_reference_is_no_reference_free_loss() -> None:
    with pytest.raises(ValueError, match="no log-probabilities of the reference"):
        PreferenceOptimization(PreferenceConfig())(ToyPolicy(), batch(None))
    for config in (PreferenceConfig(reference="none"), PreferenceConfig(loss_type="simpo")):
        metrics = PreferenceOptimization(config)(ToyPolicy(), batch(None)).metrics
        assert "kl" not in metrics
