"""What the gauge of a GPU makes of the allocator's figures; the passes themselves are in test_fitting.py."""

import pytest
import torch

from anima.train.measuring import COPIED_BYTES, GpuGauge

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("cap", "expected"),
    [
        (None, 50 + 6),  # free on the card, and held unused
        (60, 60 - 24),  # the cap counts what is allocated, used or not by others
        (200, 56),
    ],
)
def test_room_is_what_is_free_or_held_within_the_cap(
    cap: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 24)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 80))
    gauge = GpuGauge(GPU, cap)
    assert (gauge.allocated(), gauge.room()) == (24, expected)


def test_a_measurement_waits_for_the_device_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: calls.append("peak") or 77)
    gauge = GpuGauge(GPU, None)
    gauge.start()
    taken, seconds = gauge.stop()
    assert calls == ["wait", "reset", "wait", "peak"]
    assert taken == 77
    assert 0 <= seconds < 10


def test_the_speed_to_the_host_is_that_of_the_best_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, **_: empty(*size, dtype=dtype))
    gauge = GpuGauge(GPU, None)
    monkeypatch.setattr(gauge, "start", lambda: None)
    seconds = iter([0.5, 0.004, 0.005])  # the first one waits for other work
    monkeypatch.setattr(gauge, "stop", lambda: (0, next(seconds)))
    assert gauge.host_speed() == pytest.approx(COPIED_BYTES / 0.004)
