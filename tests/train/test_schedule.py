"""The learning rate at hand-worked steps."""

import pytest

from anima.train.schedule import learning_rate_at


def rates(kind: str, num_steps: int = 10, warmup_ratio: float = 0.2) -> list[float]:
    return [
        learning_rate_at(step, peak=1.0, num_steps=num_steps, warmup_ratio=warmup_ratio, kind=kind)
        for step in range(1, num_steps + 1)
    ]


def test_constant_warms_up_too() -> None:
    assert rates("constant") == pytest.approx([0.5] + [1.0] * 9)


def test_linear_falls_to_the_last_step_without_wasting_it() -> None:
    # 2 steps of warm-up, then t = 0/8, 1/8, ... 7/8.
    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_cosine_is_at_half_height_half_way() -> None:
    values = rates("cosine", num_steps=8, warmup_ratio=0.0)
    assert values[0] == pytest.approx(1.0)
    assert values[4] == pytest.approx(0.5)
    assert values == sorted(values, reverse=True)
    assert values[-1] > 0


def test_no_warmup_starts_at_the_peak_and_full_warmup_ends_there() -> None:
    assert rates("constant", warmup_ratio=0.0) == [1.0] * 10
    assert rates("linear", warmup_ratio=1.0) == pytest.approx([i / 10 for i in range(1, 11)])
