"""A prompt that is computed once gives what two give: on the weights of a real model, against each side alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anima.config.schema import LoraConfig, ModelConfig
from anima.data.batching import PairMicroBatch, collate, collate_pairs
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.lora import attach_lora, lora_b_parameters, trainable_parameters
from anima.model.packed import PackedModel
from anima.model.recompute import apply_policy
from anima.objectives.preference import pair_logps
from anima.train.reference_pass import NetworkPolicy

LENGTHS = ((37, 20, 9), (1, 3, 5), (12, 1, 1), (64, 2, 30), (2, 1, 7))
"""Tokens of each prompt and of both answers."""
Pair = tuple[TokenSequence, TokenSequence]


def pairs() -> list[Pair]:
    generator = np.random.default_rng(3)

    def side(prompt: list[int], length: int) -> TokenSequence:
        ids = np.array([*prompt, *generator.integers(100, 9000, length)], dtype=np.int32)
        labels = ids.copy()
        labels[: len(prompt)] = IGNORE_INDEX
        return TokenSequence(ids, labels)

    made = []
    for prompt_length, chosen, rejected in LENGTHS:
        prompt = generator.integers(100, 9000, prompt_length).tolist()
        made.append((side(prompt, chosen), side(prompt, rejected)))
    made.append((side([7, 8, 9], 4), side([1, 8, 9], 4)))  # without a common beginning
    return made


def twice(rows: list[Pair]) -> PairMicroBatch:
    """The same pairs with both prompts computed."""
    row = collate([side for pair in rows for side in pair])
    once = collate_pairs(rows)
    return PairMicroBatch(
        row.input_ids, row.labels, row.position_ids, row.document_lengths, answer_tokens=once.answer_tokens
    )


@pytest.fixture(scope="module")
def network(small_model_dir: Path) -> PackedModel:
    torch.manual_seed(0)
    place = Compute(torch.device("cpu"), torch.float32, "test")
    base = load_base(ModelConfig(model_name_or_path=str(small_model_dir), quantization="none"), place)
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=torch.float32, seed=1), "2").train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.02)
    return network


def sums_and_gradient(network: PackedModel, batch: PairMicroBatch) -> tuple[Tensor, Tensor]:
    logps = pair_logps(NetworkPolicy(network), batch)
    sums = torch.stack((logps.chosen, logps.rejected), 1)
    weights = torch.linspace(-1, 1, sums.numel()).view_as(sums)
    parameters = list(trainable_parameters(network).values())
    gradient = torch.autograd.grad((sums * weights).sum(), parameters)
    return sums.detach(), torch.cat([part.flatten() for part in gradient])


def test_log_probabilities_and_gradients_are_those_of_whole_sides(network: PackedModel) -> None:
    once, both = collate_pairs(pairs()), twice(pairs())
    assert once.shared_prompts is not None
    assert once.shared_prompts.lengths[1::2] == (36, 0, 11, 63, 1, 0)
    assert once.input_ids.numel() == both.input_ids.numel() - 111
    assert once.num_tokens == both.input_ids.numel()
    sums, gradient = sums_and_gradient(network, once)
    expected, expected_gradient = sums_and_gradient(network, both)
    torch.testing.assert_close(sums, expected, rtol=2e-6, atol=1e-5)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_nothing_leaks_between_sides_or_pairs(network: PackedModel) -> None:
    def logps(rows: list[Pair]) -> Tensor:
        with torch.no_grad():
            found = pair_logps(NetworkPolicy(network), collate_pairs(rows))
        return torch.stack((found.chosen, found.rejected), 1)

    rows = pairs()
    before = logps(rows)
    for pair, which in ((0, 0), (0, 1), (3, 0), (3, 1)):
        sides = list(rows[pair])
        ids = sides[which].input_ids.copy()
        ids[-2] += 1  # a token of the answer
        labels = np.where(sides[which].labels == IGNORE_INDEX, IGNORE_INDEX, ids).astype(np.int32)
        sides[which] = replace(sides[which], input_ids=ids, labels=labels)
        moved = logps([*rows[:pair], (sides[0], sides[1]), *rows[pair + 1 :]]) != before
        assert moved.nonzero().tolist() == [[pair, which]]


@pytest.mark.parametrize("policy", ["all", "cheap", "1", "cheap/1", "1/2", "all/2"])
def test_what_is_recomputed_or_sent_away_changes_no_bit(
    tiny_llama_dir: Path, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anima.model.offload.SMALLEST_BYTES", 0)
    place = Compute(torch.device("cpu"), torch.float32, "test")
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), place)
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=4), dtype=torch.float32, seed=1), "none").train()
    for parameter in lora_b_parameters(network).values():
        torch.nn.init.normal_(parameter, std=0.05)
    rows = [tuple(replace(side, input_ids=side.input_ids % 280) for side in pair) for pair in pairs()]
    rows = [
        tuple(replace(s, labels=np.where(s.labels == IGNORE_INDEX, s.labels, s.input_ids)) for s in p) for p in rows
    ]
    batch = collate_pairs(rows)  # type: ignore[arg-type]
    sums, gradient = sums_and_gradient(network, batch)
    apply_policy(network.causal_lm, policy)
    again, again_gradient = sums_and_gradient(network, batch)
    assert batch.shared_prompts is not None
    assert torch.equal(sums, again)
    assert torch.equal(gradient, again_gradient)
