"""token_logps against the plain definition in float64, and its shift by hand."""

import pytest
import torch

from anima.data.encode import IGNORE_INDEX
from anima.objectives import token_logps as module
from anima.objectives.token_logps import scored_positions, token_logps


def test_the_state_at_t_is_scored_against_the_label_at_t_plus_1() -> None:
    labels = torch.tensor([IGNORE_INDEX, 7, IGNORE_INDEX, IGNORE_INDEX, 5, 6])
    positions, targets = scored_positions(labels)
    assert positions.tolist() == [0, 3, 4]
    assert targets.tolist() == [7, 5, 6]


def test_hand_worked_value() -> None:
    # One state h = (1, 0), head rows (0,0), (ln 3, 0): logits (0, ln 3), p = (1/4, 3/4).
    hidden = torch.tensor([[1.0, 0.0], [9.0, 9.0]])
    head = torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)).item(), 0.0]])
    logps = token_logps(hidden, head, torch.tensor([IGNORE_INDEX, 1]))
    assert logps.exp().tolist() == pytest.approx([0.75])


@pytest.mark.parametrize("chunk_logits", [1, 50, 10_000])
def test_values_and_gradient_equal_the_definition_whatever_the_chunk(
    chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    head = torch.randn(11, 8, generator=generator)
    labels = torch.randint(0, 11, (13,), generator=generator)
    labels[[0, 4, 5]] = IGNORE_INDEX
    coefficients = torch.randn(10, generator=generator)

    (token_logps(hidden, head, labels) * coefficients).sum().backward()
    assert hidden.grad is not None
    got = hidden.grad.clone()

    reference = hidden.detach().double().requires_grad_(True)
    table = torch.log_softmax(reference @ head.double().T, dim=-1)
    scored = labels[1:] != IGNORE_INDEX
    expected = table[:-1][scored].gather(1, labels[1:][scored][:, None]).squeeze(1)
    (expected * coefficients.double()).sum().backward()
    assert reference.grad is not None
    torch.testing.assert_close(token_logps(hidden, head, labels).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), reference.grad, rtol=1e-5, atol=1e-5)


def test_nothing_scored_gives_an_empty_result() -> None:
    logps = token_logps(torch.randn(4, 3), torch.randn(5, 3), torch.full((4,), IGNORE_INDEX))
    assert logps.shape == (0,)


def test_no_full_table_of_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    softmax = torch.log_softmax

    def watch(logits: torch.Tensor, dim: int) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, logits.numel())
        return softmax(logits, dim=dim)

    monkeypatch.setattr(module, "CHUNK_LOGITS", 400)
    monkeypatch.setattr(torch, "log_softmax", watch)
    token_logps(torch.randn(50, 4), torch.randn(100, 4), torch.zeros(50, dtype=torch.long))
    assert largest == 400


def test_the_gradient_of_bf16_states_is_rounded_once_after_the_product_in_fp32() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 16, generator=generator).bfloat16().requires_grad_(True)
    head = torch.randn(11, 16, generator=generator).bfloat16()
    labels = torch.randint(0, 11, (9,), generator=generator)
    weights = torch.randn(8, generator=generator)
    ones, weighed = (
        torch.autograd.grad((token_logps(hidden, head, labels) * factor).sum(), hidden)[0]
        for factor in (torch.ones(8), weights)
    )
    assert weighed.dtype == torch.bfloat16
    assert torch.equal(weighed[:-1], (ones[:-1].float() * weights[:, None]).bfloat16())
