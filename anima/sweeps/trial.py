"""One trial of a local sweep as a process of its own: start, wait, ask it to stop, read what came of it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from anima.cluster.outcome import read_notes
from anima.entry import EXIT_DIR
from anima.errors import DataError, RunStopped
from anima.sweeps.command import trial_command, with_flags
from anima.sweeps.guard import children, dying_with_us
from anima.sweeps.journal import Trial
from anima.sweeps.sweep_file import Sweep
from anima.tracking.metrics_file import read_metrics
from anima.train import run_folder

POLL_SECONDS = 0.2
ASK_SECONDS = 5.0
"""Between two requests to stop: a process that is only starting does not listen yet."""


@dataclass(frozen=True)
class Place:
    """Where trials run.

    Attributes:
        folder: Of the sweep.
        extra: Flags beside the sweep's, which win.
        gpus: Numbers of the GPUs for one trial; None: all that there are.
    """

    folder: Path
    extra: Mapping[str, str]
    gpus: Sequence[str] | None = None


def command_of(sweep: Sweep, trial: Trial, place: Place) -> list[str]:
    """The sweep's command for this trial, without W&B, in a folder of its own, where it can go on."""
    own = {"tracker": "jsonl", "output_dir": str(place.folder / trial.name), "resume": "auto"}
    front, flags = trial_command(sweep, trial.parameters, os.environ)
    return [*front, *with_flags(flags, {**place.extra, **own})]


def run_trial(sweep: Sweep, trial: Trial, place: Place, stopping: Callable[[], bool]) -> Trial:
    """Run the trial to its end, or until `stopping` says so and it has saved.

    Returns:
        The trial as it stands then.
    """
    began = time.monotonic()
    notes = place.folder / "exit" / trial.name
    notes.mkdir(parents=True, exist_ok=True)
    for old in notes.iterdir():
        old.unlink()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment[EXIT_DIR] = str(notes.absolute())
    if place.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
    # Ignored signals stay so in launchers, which know no SIGUSR1; the ranks catch it.
    shell = ["/bin/sh", "-c", 'trap "" USR1; exec "$@"', "sh", *command_of(sweep, trial, place)]
    with log_of(place.folder, trial).open("ab") as log:
        process = subprocess.Popen(
            shell, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        asked = False
        next_request = 0.0
        with dying_with_us(process, log):
            while process.poll() is None:
                if stopping() and time.monotonic() >= next_request:
                    asked, next_request = True, time.monotonic() + ASK_SECONDS
                    ask_to_stop(process.pid)
                time.sleep(POLL_SECONDS)
    found = read_notes(notes)
    status = found[0].status if 0 in found else None
    done = replace(trial, seconds=trial.seconds + time.monotonic() - began, status=status)
    if status == 0:
        return replace(done, state="finished", metric=last_metric(place.folder / trial.name, sweep.metric))
    if status == RunStopped.exit_code or asked:
        return replace(done, state="stopped")
    return replace(done, state="failed", status=process.returncode if status is None else status)


def log_of(folder: Path, trial: Trial) -> Path:
    """All that the trial printed."""
    return folder / f"{trial.name}.log"


def last_metric(output_dir: Path, name: str) -> float | None:
    """The last value of a metric, as W&B's summary has it; None if it was never logged."""
    try:
        rows = read_metrics(output_dir / run_folder.METRICS)
    except (OSError, DataError):
        return None
    values = [row[name] for row in rows if name in row]
    return values[-1] if values else None


def ask_to_stop(pid: int) -> None:
    """SIGUSR1 to a process and all below it."""
    for one in [pid, *descendants(pid)]:
        try:
            os.kill(one, signal.SIGUSR1)
        except ProcessLookupError:
            continue


def descendants(pid: int) -> list[int]:
    """Processes below a process."""
    return [below for child in children(pid) for below in (child, *descendants(child))]
