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

    def step(self) -> Tensor:
        self.runs += 1
        self.number.add_(1)
        return self.number * 2

    def rewind(self) -> None:
        self.rewound += 1


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
    assert [float(step()) for _ in range(6)] == [2, 4, 6, 8, 10, 12]
    assert (counter.runs, recorder.warmed_up, recorder.proven, len(recorder.recordings)) == (3, 1, 1, 1)
    assert not recorder.refusals
    assert not counter.rewound
    step.close()
    assert recorder.recordings[0].closed


@pytest.mark.parametrize("stage", ["prove", "record"])
def test_what_cannot_be_recorded_runs_plainly(stage: str) -> None:
    counter, recorder = Counter(), Refusing(stage)
    step = ReplayedStep(counter.step, counter.rewind, recorder)
    assert [float(step()) for _ in range(5)] == [2, 4, 6, 8, 10]
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
