"""Steps run twice, are recorded, replayed, and run plainly again where a recording is refused."""

import pytest
import torch
from recorded_ops import OpRecorder
from torch import Tensor

from anima.model import replay
from anima.model.replay import Recording, ReplayedStep, Step


class Counter:
    """A step that adds 1 to a number and gives its double; counts its runs in Python."""

    def __init__(self) -> None:
        self.number = torch.zeros(())
        self.runs = 0
        self.rewound = 0
        self.before = 0.0

    def step(self) -> Tensor:
        self.runs += 1
        self.number.add_(1)
        return self.number * 2

    def rewind(self) -> None:
        self.rewound += 1
        self.number.fill_(self.before)

    def results(self, step: ReplayedStep, count: int) -> list[float]:
        found = []
        for _ in range(count):
            self.before = float(self.number)
            found.append(float(step()))
        return found


class Refusing(OpRecorder):
    """Breaks off at a stage, having run the step or not."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def prove(self, step: Step) -> Tensor:
        if self.stage == "prove":
            raise RuntimeError("the host would wait")
        return super().prove(step)

    def record(self, step: Step) -> Recording:
        raise torch.OutOfMemoryError("too much")


def test_two_plain_runs_then_the_recording() -> None:
    counter, recorder = Counter(), OpRecorder()
    step = ReplayedStep(counter.step, counter.rewind, recorder)
    assert counter.results(step, 6) == [2, 4, 6, 8, 10, 12]
    assert (recorder.warmed_up, recorder.proven, len(recorder.recordings)) == (1, 1, 1)
    assert (counter.runs, counter.rewound) == (3 + 2, 2)  # the first two replays are held against plain runs
    assert not recorder.refusals
    assert recorder.trusted
    step.close()
    assert recorder.recordings[0].closed
    again = Counter()
    assert again.results(ReplayedStep(again.step, again.rewind, recorder), 6) == [2, 4, 6, 8, 10, 12]
    assert (again.runs, again.rewound) == (3, 0)


class Constant(OpRecorder):
    """Takes the result of a later replay for a constant, as a recording does with what it read on the host."""

    def __init__(self, right_replays: int) -> None:
        super().__init__()
        self.right_replays = right_replays

    def record(self, step: Step) -> Recording:
        recording = super().record(step)
        original, count = recording.replay, [0]

        def replay() -> Tensor:
            count[0] += 1
            output = original()
            return output if count[0] <= self.right_replays else torch.full_like(output, 6.0)

        recording.replay = replay  # type: ignore[method-assign]
        return recording


@pytest.mark.parametrize("right_replays", [0, 1])
def test_a_recording_that_computes_something_else_is_refused(right_replays: int) -> None:
    counter, recorder = Counter(), Constant(right_replays)
    counter.number.fill_(10)
    step = ReplayedStep(counter.step, counter.rewind, recorder)
    assert counter.results(step, 6) == [22, 24, 26, 28, 30, 32]
    assert [str(reason).split(" by")[0] for reason in recorder.refusals] == ["a replayed step differs from the step"]
    assert recorder.recordings[0].closed
    assert not recorder.trusted


def test_a_model_that_gives_nan_is_no_reason_to_refuse() -> None:
    recorder = OpRecorder()
    step = ReplayedStep(lambda: torch.full((2,), float("nan")) * 2, lambda: None, recorder)
    assert all(bool(step().isnan().all()) for _ in range(5))
    assert not recorder.refusals


@pytest.mark.parametrize("stage", ["prove", "record"])
def test_what_cannot_be_recorded_runs_plainly(stage: str) -> None:
    counter, recorder = Counter(), Refusing(stage)
    step = ReplayedStep(counter.step, counter.rewind, recorder)
    assert counter.results(step, 5) == [2, 4, 6, 8, 10]
    assert counter.runs == 5
    assert counter.rewound == len(recorder.refusals) == 1
    step.close()


def test_a_mistake_in_the_step_is_not_hidden() -> None:
    def broken() -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        ReplayedStep(broken, lambda: None, OpRecorder())()


def test_the_recorder_of_a_device(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert replay.recorder_for(torch.device("cpu")) is None
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(replay, "_by_device", {})
    device = torch.device("cuda", 0)
    graphs = replay.recorder_for(device)
    assert graphs is not None
    assert replay.recorder_for(device) is graphs
    graphs.refuse(torch.OutOfMemoryError("much"))
    assert replay.recorder_for(device) is graphs  # another time there may be more
    graphs.refuse(RuntimeError("operation not permitted\nlong explanation"))
    assert replay.recorder_for(device) is None
    assert "too little GPU memory" in caplog.messages[0]
    assert caplog.messages[1].endswith("(operation not permitted)")
