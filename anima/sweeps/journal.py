"""The trials of a local sweep on disk: one line of JSON an event, so that a killed sweep goes on where it was.

Several workers, also on several machines, may share a folder: whoever takes a trial holds the lock.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from anima.errors import ConfigError
from anima.sweeps.sweep_file import Sweep

State = Literal["running", "finished", "failed", "stopped"]
TRIALS, SWEEP, LOCK = "trials.jsonl", "sweep.yaml", ".lock"


@dataclass(frozen=True)
class Trial:
    """A trial as it stands.

    Attributes:
        number: From 1 on.
        parameters: Chosen values, constants included.
        state: stopped is to be gone on with; running may belong to a worker that is no more.
        worker: Who has it.
        metric: Last value of the sweep's metric; None until finished, or if it was never logged.
        seconds: Wall time, all starts together.
        status: Exit status of the last start.
    """

    number: int
    parameters: Mapping[str, Any]
    state: State = "running"
    worker: str = ""
    metric: float | None = None
    seconds: float = 0.0
    status: int | None = None

    @property
    def name(self) -> str:
        """Folder of the trial."""
        return f"trial-{self.number:03d}"


@dataclass(frozen=True)
class Journal:
    """The trials in a folder.

    Args:
        folder: Of the sweep.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, sweep: Sweep) -> "Journal":
        """The journal of this sweep; made if it is missing.

        Raises:
            ConfigError: the folder holds trials of another sweep, or cannot be written.
        """
        journal = cls(folder)
        copy = folder / SWEEP
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with journal.alone():
                if copy.exists() and copy.read_text(encoding="utf-8") != sweep.text and journal.trials():
                    raise ConfigError(
                        "the folder holds trials of another sweep, or of this one before it was changed",
                        where=f"--sweep_dir {folder}",
                        got=f"{copy} differs from {sweep.path}",
                        fix=f"--sweep_dir {folder}-2, or rm -r {folder}",
                    )
                copy.write_text(sweep.text, encoding="utf-8")
        except OSError as error:
            what = "the folder of the trials cannot be written"
            raise ConfigError(what, where=f"--sweep_dir {folder}", got=error, fix="name another folder") from None
        return journal

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other worker reads or writes meanwhile."""
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def trials(self) -> list[Trial]:
        """All trials, by number."""
        path = self.folder / TRIALS
        found: dict[int, Trial] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                values = json.loads(line)
            except ValueError:  # the last line of a killed worker
                continue
            found[values["number"]] = Trial(**values)
        return [found[number] for number in sorted(found)]

    def write(self, trial: Trial) -> Trial:
        """Add how a trial stands; call it alone."""
        with (self.folder / TRIALS).open("a", encoding="utf-8") as file:
            file.write("\n" * (not _ends_whole(self.folder / TRIALS)) + json.dumps(asdict(trial)) + "\n")
        return trial

    def take_back(self, trials: Sequence[Trial], worker: str) -> Trial | None:
        """A trial to go on with: one that was stopped, or that this worker had when it was killed."""
        for trial in trials:
            if trial.state == "stopped" or (trial.state == "running" and trial.worker == worker):
                return self.write(replace(trial, state="running", worker=worker))
        return None


def _ends_whole(path: Path) -> bool:
    """Whether the file ends with a newline, or is empty."""
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"
