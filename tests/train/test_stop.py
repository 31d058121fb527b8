"""Requests to stop, with a clock of our own; real signals to real runs are in tests/faults."""

import signal

import pytest

from anima.train import stop
from anima.train.stop import REASONS, StopRequest, reasons


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_flags_say_what_asked_and_stay() -> None:
    request = StopRequest(clock=Clock())
    request.defer()
    assert request.flags() == [0, 0, 0, 0]
    request.received(signal.SIGUSR1)
    request.received(signal.SIGWINCH)
    assert request.flags() == request.flags() == [0, 1, 0, 0]
    # Added up over three ranks, of which one got SIGTERM and two Ctrl-C.
    assert reasons([1.0, 0.0, 2.0, 0.0]) == ["SIGTERM", "Ctrl-C"]
    assert len(REASONS) == len(request.flags())


def test_the_time_limit_leaves_the_reserve_free() -> None:
    clock = Clock()
    request = StopRequest(60.0, clock)
    request.reserve_seconds = 10.0
    clock.now = 149.9
    assert request.flags()[3] == 0
    clock.now = 150.0
    assert request.flags()[3] == 1


def test_an_echo_of_ctrl_c_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", ended.append)
    clock = Clock()
    request = StopRequest(clock=clock)
    request.defer()
    request.received(signal.SIGINT)
    clock.now += 0.5  # torchrun hands on what the terminal has sent already
    request.received(signal.SIGINT)
    assert ended == []
    clock.now += 1.5
    request.received(signal.SIGINT)
    assert ended == [130]


def test_sigterm_after_ctrl_c_does_not_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", ended.append)
    clock = Clock()
    request = StopRequest(clock=clock)
    request.defer()
    request.received(signal.SIGINT)
    clock.now += 30
    request.received(signal.SIGTERM)
    assert ended == []
    assert request.flags() == [1, 0, 1, 0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_before_the_first_step_there_is_nothing_to_wait_for(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", ended.append)
    StopRequest(clock=Clock()).received(number)
    assert ended == [code]
