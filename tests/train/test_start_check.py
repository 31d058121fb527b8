"""Policy against reference before the first step: equal passes, rounding passes, another model does not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from anima.config.preference import PreferenceConfig
from anima.data.batching import PairMicroBatch, collate_pairs, pair_filler
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.errors import TrainingError
from anima.objectives.preference import pair_logps
from anima.train.start_check import check_start

LN2 = 0.6931471805599453


class Policy(SimpleNamespace):
    """An engine as the check sees one."""

    def eval_mode(self) -> None:
        self.modes.append("eval")

    def train_mode(self) -> None:
        self.modes.append("train")

    def __call__(self, batch: Any) -> torch.Tensor:
        states: torch.Tensor = self.table[batch.input_ids[0]]
        return states


def policy() -> Any:
    generator = torch.Generator().manual_seed(0)
    table, head = torch.randn(9, 4, generator=generator), torch.randn(9, 4, generator=generator)
    return Policy(table=table, head_weight=head, device="cpu", modes=[])


def side(*ids: int) -> TokenSequence:
    labels = np.array(ids, dtype=np.int32)
    labels[0] = IGNORE_INDEX
    return TokenSequence(np.array(ids, dtype=np.int32), labels)


PAIRS = [(side(1, 2, 3), side(1, 4)), (side(2, 5, 6, 7), side(2, 8, 8))]


def batches(shift: torch.Tensor) -> list[PairMicroBatch]:
    """The pairs with what `policy` says about them, shifted, and a filler as a rank may get one."""
    said = pair_logps(policy(), collate_pairs(PAIRS))
    known = torch.stack((said.chosen, said.rejected), 1) + shift
    return [collate_pairs(PAIRS, known), pair_filler(PAIRS[0][0], with_reference=True)]


@pytest.mark.parametrize(("dtype", "noise"), [(torch.float32, 0.005), (torch.bfloat16, 0.3)])
def test_rounding_passes(dtype: torch.dtype, noise: float) -> None:
    shift = torch.tensor([[noise, 0.0], [0.0, noise]])  # cancels in the mean loss
    engine = policy()
    found = check_start(engine, PreferenceConfig(), batches(shift), dtype, must_be_equal=True)
    assert found["start/loss"] == pytest.approx(LN2, abs=1e-3)
    assert found["start/max_logp_gap"] == pytest.approx(noise, rel=1e-3)
    assert engine.modes == ["eval", "train"]


@pytest.mark.parametrize(
    ("dtype", "shift"),
    [
        (torch.float32, [[0.1, 0.0], [0.0, 0.1]]),  # the mean loss is ln 2, the answers' numbers are not
        (torch.float32, [[0.009, -0.009], [0.009, -0.009]]),  # within rounding one by one, but all one way
        (torch.bfloat16, [[0.0, 5.0], [5.0, 0.0]]),
    ],
)
def test_another_model_is_refused(dtype: torch.dtype, shift: list[list[float]]) -> None:
    config, given = PreferenceConfig(), batches(torch.tensor(shift))
    with pytest.raises(TrainingError, match="the policy is not its reference"):
        check_start(policy(), config, given, dtype, must_be_equal=True)
    found = check_start(policy(), config, given, dtype, must_be_equal=False)
    assert found["start/max_logp_gap"] == pytest.approx(max(map(max, shift)), rel=0.02)
