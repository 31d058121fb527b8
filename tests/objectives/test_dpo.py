"""The losses over pairs: hand-worked numbers, the ancestor's golden cases, invariants, and TRL's own code."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anima.config.preference import PreferenceConfig
from anima.objectives.dpo import (
    PairLogps,
    hinge_loss,
    ipo_loss,
    margin,
    orpo_loss,
    pair_losses,
    rewards,
    robust_loss,
    sft_losses,
    sigmoid_loss,
    simpo_loss,
    sum_by_document,
)

LN2 = math.log(2)


def pair(chosen: float | list[float], rejected: float | list[float]) -> PairLogps:
    values = [[x] if isinstance(x, float | int) else x for x in (chosen, rejected)]
    return PairLogps(*(torch.tensor(value, dtype=torch.float64) for value in values))


def test_hand_worked_losses() -> None:
    # beta h = ln 3: sigma = 3/4.
    h = torch.tensor([math.log(3) / 0.5], dtype=torch.float64)
    assert sigmoid_loss(h, beta=0.5).item() == pytest.approx(-math.log(0.75))
    assert sigmoid_loss(h, beta=0.5, label_smoothing=0.2).item() == pytest.approx(
        -0.8 * math.log(0.75) - 0.2 * math.log(0.25)
    )
    assert robust_loss(h, beta=0.5, label_smoothing=0.2).item() == pytest.approx(
        (-0.8 * math.log(0.75) + 0.2 * math.log(0.25)) / 0.6
    )
    assert ipo_loss(torch.tensor([3.0]), beta=0.25).item() == pytest.approx(1.0)  # (3 - 2)^2
    assert hinge_loss(torch.tensor([3.0, 6.0]), beta=0.25).tolist() == pytest.approx([0.25, 0.0])
    # beta (-1 + 3) - gamma = ln 3 + 0 with beta = (ln 3 + 0.4) / 2, gamma = 0.4.
    beta = (math.log(3) + 0.4) / 2
    assert simpo_loss(pair(-1, -3), beta=beta, gamma=0.4).item() == pytest.approx(-math.log(0.75))
    # p = 1/2 and 1/4: odds 1 and 1/3, so the ratio is 3: ln 2 - beta ln(3/4).
    found = orpo_loss(pair(math.log(0.5), math.log(0.25)), beta=0.1)
    assert found.item() == pytest.approx(LN2 - 0.1 * math.log(0.75))
    assert sft_losses(pair(-8, -3), pair(4, 1)).item() == pytest.approx(2.0)


def golden(folder: Path) -> dict[str, Any]:
    cases: dict[str, Any] = json.loads((folder / "golden_cases.json").read_text("utf-8"))
    return cases


def test_golden_losses(shared_data_dir: Path) -> None:
    cases = golden(shared_data_dir)["dpo_loss_cases"]
    assert len(cases) == 6
    for case in cases:
        config = PreferenceConfig(beta=case["beta"])
        policy = pair(case["policy_chosen"], case["policy_rejected"])
        policy.chosen.requires_grad_()
        reference = pair(case["ref_chosen"], case["ref_rejected"])
        compared = pair(0.0, 0.0) if case["reference_free"] else reference
        loss = pair_losses(config, policy, compared, pair(7, 9)).sum()
        loss.backward()
        assert policy.chosen.grad is not None
        assert loss.item() == pytest.approx(case["loss"], abs=1e-6)
        assert policy.chosen.grad.item() == pytest.approx(case["grad_wrt_policy_chosen"], abs=1e-6)
        implicit = rewards(config, policy, reference, pair(7, 9))
        chosen, rejected = implicit.chosen.item(), implicit.rejected.item()
        assert chosen == pytest.approx(case["chosen_reward"], abs=1e-6)
        assert rejected == pytest.approx(case["rejected_reward"], abs=1e-6)
        assert chosen - rejected == pytest.approx(case["margin"], abs=1e-6)
        assert float(chosen > rejected) == case["accuracy"]


def test_golden_sequence_log_probabilities(shared_data_dir: Path) -> None:
    """Both rows packed; hidden states are the logits themselves, the head is the identity."""
    from anima.data.encode import IGNORE_INDEX
    from anima.objectives.token_logps import token_logps

    case = golden(shared_data_dir)["batch_logps"]
    vocabulary, pad = case["vocab"], case["pad_id"]
    ids = torch.tensor(case["input_ids"])
    rows, length = ids.shape
    flat = torch.arange(rows * length * vocabulary, dtype=torch.float64)
    logits = (3 * torch.sin(0.7 * flat)).reshape(rows * length, vocabulary).float()
    for name, prompt in (("anima_rule_sum_all_nonpad_labels", 1), ("completion_only_prompt_len_3", 3)):
        labels = ids.clone()
        labels[:, :prompt] = IGNORE_INDEX
        labels[ids == pad] = IGNORE_INDEX
        scored = (labels != IGNORE_INDEX).sum(dim=1)
        logps = sum_by_document(token_logps(logits, torch.eye(vocabulary), labels.flatten()), scored)
        assert logps.tolist() == pytest.approx(case[name], abs=1e-6), name


def test_the_sum_by_document_keeps_documents_apart_and_is_differentiable() -> None:
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = sum_by_document(logps, torch.tensor([2, 0, 3]))
    assert sums.tolist() == [3.0, 0.0, 28.0]
    (sums * torch.tensor([10.0, 1.0, -1.0])).sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [10.0, 10.0, -1.0, -1.0, -1.0]


def test_prompt_tokens_in_the_sum_change_rewards_but_neither_loss_nor_gradient() -> None:
    """The ancestor summed over prompt and answer: with one prefix in front of both answers it cancels."""
    generator = torch.Generator().manual_seed(0)
    config = PreferenceConfig()
    answers = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)  # model, side, token
    prompts = torch.randn(2, 1, 3, generator=generator, dtype=torch.float64).expand(2, 2, 3)
    results = []
    for tokens in (answers, torch.cat([prompts, answers], dim=-1)):
        given = tokens.clone().requires_grad_()
        sums = given.sum(-1)
        policy, reference = (PairLogps(sums[i, 0:1], sums[i, 1:2]) for i in (0, 1))
        loss = pair_losses(config, policy, reference, pair(5, 5)).sum()
        loss.backward()
        assert given.grad is not None
        results.append((loss.item(), given.grad[0, :, -5:], given.grad, rewards(config, policy, reference, pair(5, 5))))
    masked, whole = results
    assert whole[0] == pytest.approx(masked[0], abs=1e-12)
    torch.testing.assert_close(whole[1], masked[1])
    shift = 0.1 * (prompts[0, 0].sum() - prompts[1, 0].sum())
    assert (whole[3].chosen - masked[3].chosen).item() == pytest.approx(shift.item())
    # The prompt's own gradient is that of +x and -x: it is the same tokens in both sequences, so it vanishes.
    torch.testing.assert_close(whole[2][0, 0, :3] + whole[2][0, 1, :3], torch.zeros(3, dtype=torch.float64))


POLICY, REFERENCE = pair([-10, -30], [-12, -25]), pair([-11, -28], [-11.5, -26])
TOKENS = pair([5, 9], [7, 4])
WITH_REFERENCE = [
    PreferenceConfig(),
    PreferenceConfig(label_smoothing=0.1),
    PreferenceConfig(loss_type="ipo"),
    PreferenceConfig(loss_type="hinge"),
    PreferenceConfig(loss_type="robust", label_smoothing=0.1),
    PreferenceConfig(length_normalize=True),
]
ALL = [*WITH_REFERENCE, PreferenceConfig(loss_type="simpo", beta=2.0), PreferenceConfig(loss_type="orpo")]


def test_beta_to_zero_gives_ln_2_and_no_gradient() -> None:
    for label_smoothing, kind in ((0.0, "sigmoid"), (0.2, "sigmoid"), (0.2, "robust")):
        config = PreferenceConfig(beta=1e-9, label_smoothing=label_smoothing, loss_type=kind)  # type: ignore[arg-type]
        policy = pair([-10, -30], [-12, -25])
        policy.chosen.requires_grad_()
        losses = pair_losses(config, policy, REFERENCE, TOKENS)
        losses.sum().backward()
        assert policy.chosen.grad is not None
        assert losses.tolist() == pytest.approx([LN2, LN2], abs=1e-8)
        assert policy.chosen.grad.abs().max() < 1e-8


@pytest.mark.parametrize("config", WITH_REFERENCE, ids=lambda c: f"{c.loss_type}-{c.label_smoothing}")
def test_an_untrained_policy_has_the_same_loss_on_every_pair(config: PreferenceConfig) -> None:
    losses = pair_losses(config, REFERENCE, REFERENCE, TOKENS).tolist()
    expected = {"sigmoid": LN2, "robust": LN2, "hinge": 1.0, "ipo": 25.0}[config.loss_type]
    assert losses == pytest.approx([expected, expected])


@pytest.mark.parametrize("config", WITH_REFERENCE, ids=lambda c: f"{c.loss_type}-{c.label_smoothing}")
def test_a_constant_added_to_both_answers_changes_nothing(config: PreferenceConfig) -> None:
    equal = pair([6, 6], [6, 6])
    shifted = PairLogps(POLICY.chosen + 3.5, POLICY.rejected + 3.5)
    before, after = (pair_losses(config, policy, REFERENCE, equal) for policy in (POLICY, shifted))
    torch.testing.assert_close(after, before)


def test_exchanging_the_answers_flips_the_margin() -> None:
    swapped = [PairLogps(p.rejected, p.chosen) for p in (POLICY, REFERENCE)]
    torch.testing.assert_close(margin(*swapped), -margin(POLICY, REFERENCE))
    # sigma(x) + sigma(-x) = 1
    config = PreferenceConfig()
    one = torch.exp(-pair_losses(config, POLICY, REFERENCE, TOKENS))
    other = torch.exp(-pair_losses(config, swapped[0], swapped[1], TOKENS))
    torch.testing.assert_close(one + other, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("config", ALL, ids=lambda c: f"{c.loss_type}-{c.label_smoothing}-{c.length_normalize}")
def test_every_loss_wants_the_chosen_answer_up_and_the_rejected_down(config: PreferenceConfig) -> None:
    policy = pair([-10.0], [-12.0])
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    pair_losses(config, policy, pair([-11.0], [-11.5]), pair([5], [7])).sum().backward()
    assert policy.chosen.grad is not None
    assert policy.rejected.grad is not None
    assert policy.chosen.grad.item() < 0 < policy.rejected.grad.item()


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_trl_agrees(loss_type: str) -> None:
    """TRL's own method on the same token log-probabilities; it has no function that could be called alone."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="trl is not installed")
    compute = getattr(dpo_trainer.DPOTrainer, "_compute_loss", None)
    if compute is None or "log_probs" not in compute.__code__.co_names:
        pytest.skip("this trl keeps its loss elsewhere")
    generator = torch.Generator().manual_seed(1)
    pairs, length = 3, 9
    mask = torch.zeros(2 * pairs, length, dtype=torch.long)
    for row, count in enumerate((4, 5, 2, 3, 1, 6)):
        mask[row, 2 : 2 + count] = 1
    logps = -torch.rand(2 * pairs, length - 1, generator=generator) * mask[:, 1:]
    reference = -3 * torch.rand(2 * pairs, generator=generator)
    smoothing = 0.2 if loss_type == "robust" else 0.0
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=False,
        _total_train_tokens=0,
        _metrics={"eval": {name: [] for name in METRICS_OF_TRL}},
    )
    outputs = SimpleNamespace(
        log_probs=logps, entropy=logps, mean_logits=logps, is_top1=torch.zeros_like(logps, dtype=torch.bool)
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:pairs],
        "ref_rejected_logps": reference[pairs:],
    }
    theirs = compute(trainer, lambda **_: outputs, inputs, False)

    normalised = loss_type in ("ipo", "sigmoid_norm")
    config = PreferenceConfig(
        loss_type=loss_type.removesuffix("_norm"),  # type: ignore[arg-type]
        beta=0.3,
        label_smoothing=smoothing,
        length_normalize=normalised,
    )
    sums, counts = logps.sum(1), mask.sum(1).float()
    ours = pair_losses(
        config,
        PairLogps(sums[:pairs], sums[pairs:]),
        PairLogps(reference[:pairs], reference[pairs:]),
        PairLogps(counts[:pairs], counts[pairs:]),
    ).mean()
    torch.testing.assert_close(ours, theirs)


METRICS_OF_TRL = (
    "entropy",
    "num_tokens",
    "logits/chosen",
    "logits/rejected",
    "mean_token_accuracy",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
