"""A step of fixed shapes that runs again and again: twice as it is, then recorded as a CUDA graph and replayed.

The host launches thousands of small kernels for a step, through slow Python; a replay is one launch. Owns streams,
recording, the proof that a replay computes the same, and the way back to plain runs. Knows nothing of models.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_REPLAYS_CHECKED = 2
"""Replays of a process's first recording that are held against plain runs: the second one reads other inputs than the
recording did, and shows what was taken for a constant."""
_TOLERANCE = 0.01
"""Relative difference of two results of the same kernels, which may add in another order."""

Step = Callable[[], Tensor]
"""Reads and writes buffers that stay where they are; the result is valid until the next run."""


class Recording(Protocol):
    """A recorded step."""

    def replay(self) -> Tensor:
        """Run it once more."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Recorder(Protocol):
    """How a device records steps; in the tests something that only counts."""

    trusted: bool
    """Whether replays were found to compute what plain runs do."""

    def warm_up(self, step: Step) -> Tensor:
        """Run the step where it will be recorded, so that what is compiled at first use is compiled."""
        ...

    def prove(self, step: Step) -> Tensor:
        """Run it again, as if recorded; RuntimeError if it could not be."""
        ...

    def record(self, step: Step) -> Recording:
        """Record it without running it; RuntimeError if it cannot be."""
        ...

    def refuse(self, reason: Exception) -> None:
        """Take note that a step could not be recorded."""
        ...


class ReplayedStep:
    """Runs a step: the first two times as it is, then from its recording."""

    def __init__(self, step: Step, rewind: Callable[[], None], recorder: Recorder) -> None:
        """Bind the step; `rewind` undoes a run that broke off within."""
        self._step = step
        self._rewind = rewind
        self._recorder: Recorder | None = recorder
        self._recording: Recording | None = None
        self._runs = 0

    def __call__(self) -> Tensor:
        """One run. Read the result before the next one."""
        if self._recorder is None:
            return self._step()
        self._runs += 1
        if self._runs == 1:
            return self._recorder.warm_up(self._step)
        try:
            if self._runs == 2:
                return self._recorder.prove(self._step)
            if self._recording is None:
                self._recording = self._recorder.record(self._step)
            output = self._recording.replay()
            return output if self._recorder.trusted else self._compared(output, self._recorder)
        except RuntimeError as error:  # torch's one class for all that a device refuses
            self._recorder.refuse(error)
        # Behind the except clause, whose traceback holds all that the broken run had made.
        self.close()
        self._rewind()
        return self._step()

    def _compared(self, replayed: Tensor, recorder: Recorder) -> Tensor:
        """The result of a plain run, if a replay gave the same.

        Raises:
            RuntimeError: it did not.
        """
        replayed = replayed.clone()
        self._rewind()
        plain = self._step()
        difference = float((replayed.float() - plain.float()).norm() / plain.float().norm())
        if difference > _TOLERANCE:  # not where the model itself gives NaN
            raise RuntimeError(f"a replayed step differs from the step by {difference:.2g}")
        recorder.trusted = self._runs >= 2 + _REPLAYS_CHECKED
        return plain

    def close(self) -> None:
        """Let go of the recording and of what the step holds; what still runs is run plainly."""
        if self._recording is not None:
            self._recording.close()
        self._recording = self._recorder = None


class CudaGraphs:
    """Records steps on one GPU, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        """Bind to a device."""
        self._device = device
        # Always the same one: the workspaces of the matrix products are kept by stream.
        self._stream = torch.cuda.Stream(device)
        self.refused = False
        self.trusted = False

    def warm_up(self, step: Step) -> Tensor:
        """See `Recorder`."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream):
                return step()
        finally:  # also after Ctrl-C: what the step works on is freed and used again by `here`
            here.wait_stream(self._stream)

    def prove(self, step: Step) -> Tensor:
        """See `Recorder`. A host that waits for the GPU breaks a recording off, which is better found out before: torch
        does not quite recover from it (pytorch issue 171263)."""
        with _refusing_to_wait():
            return self.warm_up(step)

    def record(self, step: Step) -> Recording:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context restores the stream where the inner one fails to. Other threads of a training, such as
            # NCCL's, may go on meanwhile: thread_local.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                output = step()
        except RuntimeError:
            self._renew_random_numbers()
            raise
        return _CudaRecording(graph, output)

    def refuse(self, reason: Exception) -> None:
        """See `Recorder`. Too little memory may be enough another time; anything else holds for the process."""
        if isinstance(reason, torch.OutOfMemoryError):
            _log.warning("an answer comes more slowly: too little GPU memory to record its steps")
            return
        self.refused = True
        first_line = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        _log.warning("answers come more slowly: their steps cannot be recorded as CUDA graphs here (%s)", first_line)

    def _renew_random_numbers(self) -> None:
        """After a recording that broke off torch takes its generator for recorded and refuses to draw (issue 171263).

        The same numbers go on in a copy, which is not marked.
        """
        generator = torch.cuda.default_generators[self._device.index or 0]
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """RuntimeError where the host would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # "… is a prototype feature"
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _CudaRecording:
    """A CUDA graph and where its result lies."""

    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph = graph
        self._output: Tensor | None = output

    def replay(self) -> Tensor:
        assert self._output is not None
        self._graph.replay()
        return self._output

    def close(self) -> None:
        torch.cuda.current_stream().synchronize()  # after Ctrl-C it may still run
        self._output = None
        self._graph.reset()


_by_device: dict[torch.device, CudaGraphs] = {}


def recorder_for(device: torch.device) -> Recorder | None:
    """What records steps on this device; None on a CPU, and on a GPU where it did not work."""
    if device.type != "cuda":
        return None
    graphs = _by_device.get(device)
    if graphs is None:
        graphs = _by_device[device] = CudaGraphs(device)
    return None if graphs.refused else graphs
