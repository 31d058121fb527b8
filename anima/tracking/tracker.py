"""Who hears about a run: the Tracker protocol, how to start the trackers a config asks for, and an early check.

The loop calls `log` and never asks who listens. Knows nothing of torch; "main" is the one process that writes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from anima.config.schema import OutputConfig
from anima.errors import TrackingError
from anima.tracking.metrics_file import JsonlTracker
from anima.tracking.sample import Sample
from anima.tracking.wandb_check import check_wandb

__all__ = ["NullTracker", "Sample", "Tracker", "TrackerGroup", "check_tracker", "start_tracker"]


class Tracker(Protocol):
    """Takes what a run tells. No method raises because of a full disk or a lost network: a started run goes on."""

    @property
    def run_id(self) -> str | None:
        """Identity on W&B, to be kept in checkpoints and given back to `start_tracker`; None without W&B."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics after optimizer step `step` (0: before the first); names carry their units."""
        ...

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """The model's answers after step `step`."""
        ...

    def summary(self, values: Mapping[str, object]) -> None:
        """Final values of the run, by name."""
        ...

    def log_adapter(self, folder: Path) -> None:
        """The final adapter; `folder` is not changed afterwards."""
        ...

    def finish(self, exit_code: int = 0) -> None:
        """End; always called, also after an error, with the process's exit code. A second call does nothing."""
        ...


class NullTracker:
    """Listens to nothing: on other ranks, and for `--tracker none`."""

    run_id: str | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Nothing."""

    def log_adapter(self, folder: Path) -> None:
        """Nothing."""

    def finish(self, exit_code: int = 0) -> None:
        """Nothing."""


class TrackerGroup:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        """Pass every call on to `trackers`, in order."""
        self._trackers = tuple(trackers)

    @property
    def run_id(self) -> str | None:
        """The first identity that a tracker has."""
        return next((tracker.run_id for tracker in self._trackers if tracker.run_id), None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.log_samples(step, samples)

    def summary(self, values: Mapping[str, object]) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.summary(values)

    def log_adapter(self, folder: Path) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.log_adapter(folder)

    def finish(self, exit_code: int = 0) -> None:
        """To every tracker."""
        for tracker in self._trackers:
            tracker.finish(exit_code)


def check_tracker(output: OutputConfig, *, is_main: bool = True) -> None:
    """Find out whether the tracker can start: milliseconds, no network, before any heavy work, on every rank.

    Args:
        output: Which tracker is asked for.
        is_main: Whether this process will write. Only that one needs a key: launchers over ssh (DeepSpeed's hostfile
            mode) do not hand WANDB_* variables to other nodes.

    Raises:
        TrackingError: W&B is asked for and not installed, or has neither a key nor an offline mode.
    """
    if output.tracker == "wandb" and is_main:
        check_wandb(os.environ)


def start_tracker(
    output: OutputConfig,
    *,
    resolved_config: Mapping[str, object],
    is_main: bool,
    run_id: str | None = None,
    logged_until: int = -1,
) -> Tracker:
    """Start what the config asks for. Not a collective: raises on the main rank only, so call it before ranks meet.

    Args:
        output: Tracker, folder, project and name.
        resolved_config: All options by their flag names (`Config.flat()`).
        is_main: Whether this process writes; the others get a tracker that does nothing.
        run_id: A former run's `Tracker.run_id` to continue on W&B.
        logged_until: Latest step that this run has on W&B already; what a resumed run repeats is not sent again.

    Raises:
        TrackingError: metrics.jsonl cannot be written, W&B does not answer, or an option holds a secret.
    """
    if not is_main or output.tracker == "none":
        return NullTracker()
    local = JsonlTracker(Path(output.output_dir))
    if output.tracker == "jsonl":
        return local
    # wandb takes a second to import: only for those who asked for it.
    from anima.tracking.wandb_tracker import WandbTracker

    try:
        remote = WandbTracker(output, resolved_config=resolved_config, run_id=run_id, logged_until=logged_until)
    except TrackingError:
        local.abandon()
        raise
    return TrackerGroup((local, remote))
