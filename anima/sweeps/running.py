"""A local sweep: workers that take trials from the journal until there are enough. Stops when it is asked to."""

import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from types import FrameType

from anima.errors import RunStopped, TrainingError
from anima.sweeps.journal import Journal, Trial
from anima.sweeps.sampler import propose
from anima.sweeps.sweep_file import Sweep
from anima.sweeps.trial import Place, log_of, run_trial

FAILURES = 3
"""So many failed trials in a row, and the sweep stops: the next would fail as well."""


@dataclass
class LocalSweep:
    """A sweep that this process runs.

    Attributes:
        sweep: What.
        journal: Its trials.
        places: One for each trial that runs at the same time.
        num_trials: Trials of the whole folder, finished and failed ones included.
        seed: Of what is chosen at random.
        worker: Name of this process among those that share the folder.
        tell: Hears a line for every event.
    """

    sweep: Sweep
    journal: Journal
    places: Sequence[Place]
    num_trials: int
    seed: int
    worker: str
    tell: Callable[[str], None]
    _stop: threading.Event = field(default_factory=threading.Event)
    _failed_in_a_row: int = 0

    def run(self) -> list[Trial]:
        """Run trials until the folder holds `num_trials`, or a grid is used up.

        Raises:
            RunStopped: SIGINT, SIGTERM or SIGUSR1 came; trials have saved what they had.
            TrainingError: trials fail one after another.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        with ThreadPoolExecutor(len(self.places)) as pool:
            futures: set[Future[None]] = {
                pool.submit(self._work, place, f"{self.worker}.{index}") for index, place in enumerate(self.places)
            }
            # Short waits: Python handles signals between them.
            while futures:
                done, futures = wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
                if any(future.exception() for future in done):
                    self._stop.set()
                for future in done:
                    future.result()
        if self._stop.is_set():
            raise RunStopped(
                "the sweep has been stopped",
                got=f"{sum(trial.state == 'finished' for trial in self.journal.trials())} trials are finished",
                fix="the same command goes on, also with trials that were cut off",
            )
        return self.journal.trials()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self._stop.is_set():
            self.tell(f"{signal.Signals(number).name}: running trials save and stop")
        self._stop.set()

    def _work(self, place: Place, worker: str) -> None:
        while not self._stop.is_set() and (trial := self._next(worker)) is not None:
            self.tell(f"{trial.name} begins: {parameters_text(self.sweep, trial)}")
            done = run_trial(self.sweep, trial, place, self._stop.is_set)
            with self.journal.alone():
                self.journal.write(done)
            self.tell(f"{done.name} {done.state}: {self._result(done)} ({done.seconds / 60:.1f} min)")
            self._count(done, place)

    def _next(self, worker: str) -> Trial | None:
        with self.journal.alone():
            trials = self.journal.trials()
            if (again := self.journal.take_back(trials, worker)) is not None:
                return again
            if len(trials) >= self.num_trials:
                return None
            parameters = propose(self.sweep, trials, self.seed)
            if parameters is None:
                return None
            return self.journal.write(Trial(len(trials) + 1, parameters, worker=worker))

    def _count(self, done: Trial, place: Place) -> None:
        if done.state == "failed":
            self._failed_in_a_row += 1
            lines = log_of(place.folder, done).read_text(encoding="utf-8", errors="replace").splitlines()
            self.tell("\n".join([f"--- {log_of(place.folder, done)}, last lines", *lines[-12:]]))
        elif done.state == "finished":
            self._failed_in_a_row = 0
        if self._failed_in_a_row >= FAILURES:
            raise TrainingError(
                f"{FAILURES} trials in a row have failed",
                where=log_of(place.folder, done),
                got=f"exit status {done.status}",
                fix="mend what the log tells; then a new --sweep_dir, since failed trials are not tried again",
            )

    def _result(self, trial: Trial) -> str:
        if trial.metric is not None:
            return f"{self.sweep.metric} {trial.metric:.5g}"
        if trial.state == "finished":
            return f"no {self.sweep.metric} was logged"
        return f"exit status {trial.status}"


def parameters_text(sweep: Sweep, trial: Trial) -> str:
    """What varies, in a line."""
    return ", ".join(f"{p.name} {trial.parameters[p.name]}" for p in sweep.parameters if p.varies)
