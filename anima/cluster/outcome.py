"""What came of a start of a run in a job, and what the job does next: end, be requeued, or give up.

Reads the notes that ranks leave (anima/entry.py), the run's folder, and the job's own memory of its earlier starts.
Knows nothing of Slurm: signals are told to it, and it only says what is to be done.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from anima.config.cli import parse_config
from anima.config.paths import expanded
from anima.config.schema import Config
from anima.disk import replace_file
from anima.entry import RUNNING
from anima.errors import AnimaError, ConfigError, OutOfMemory, RunStopped, TrainingError
from anima.train import checkpoint, run_folder

FRUITLESS = 3
"""So many starts in a row that end without a later checkpoint, and the job gives up."""
FINAL = frozenset({AnimaError.exit_code, TrainingError.exit_code, OutOfMemory.exit_code, 130})
"""Exit statuses that another start would only repeat."""
MEMORY = "job.json"

Asked = Literal["nothing", "time_limit", "end"]
"""What the job was told while the ranks ran: nothing, that its time is up, or to end (cancelled or preempted)."""
Next = Literal["done", "requeue", "give_up", "leave"]
"""leave: neither done nor requeued; whoever ended the job decides."""


@dataclass(frozen=True)
class Note:
    """How a rank ended; status None: it was killed, or ended in a way that left no time for a word."""

    status: int | None
    words: str = ""


@dataclass(frozen=True)
class Memory:
    """What a job keeps between its starts.

    Attributes:
        output_dir: The run's folder.
        step: Newest checkpoint when this start began; 0 for none.
        fruitless: Starts in a row before this one that brought none.
    """

    output_dir: str
    step: int
    fruitless: int = 0


@dataclass(frozen=True)
class Verdict:
    """What the job does next, why, and what it then remembers of fruitless starts."""

    next: Next
    why: str
    fruitless: int = 0


def read_notes(folder: Path) -> dict[int, Note]:
    """The notes of all ranks that began, by rank."""
    notes = {}
    for path in folder.glob("rank-*"):
        status, _, words = path.read_text(encoding="utf-8").partition("\n")
        known = status != RUNNING and status.lstrip("-").isdecimal()
        notes[int(path.name.removeprefix("rank-"))] = Note(int(status) if known else None, words.strip())
    return notes


def newest_step(output_dir: str) -> int:
    """Step of the newest checkpoint in a run's folder; 0 for none."""
    return max(checkpoint.steps(expanded(output_dir, "--output_dir") / run_folder.CHECKPOINTS), default=0)


def is_finished(config: Config) -> bool:
    """Whether the run that `config` asks for lies in its folder already, whole.

    A finished run that is to go on (more steps than its summary tells, or checkpoints that go beyond it) is not, nor
    one with other options: training itself then goes on or says what differs, and the job must not end in silence.
    """
    folder = expanded(config.output.output_dir, "--output_dir")
    try:
        done = int(json.loads((folder / run_folder.SUMMARY).read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = config.optimization.max_steps or done
    if wanted > done or newest_step(config.output.output_dir) > done:
        return False
    from anima.train.resume import FREE  # imports torch: only for a run that seems finished

    try:
        saved, _ = parse_config(["--config", str(folder / run_folder.CONFIG)])
    except ConfigError:  # of another version
        return False
    old, new = saved.flat(), config.flat()
    length = {"max_steps", "num_train_epochs"} if config.optimization.max_steps else set()  # compared above
    return all(old[name] == new[name] for name in new.keys() - FREE - length)


def remember(folder: Path, memory: Memory) -> None:
    """Write what a job keeps between its starts."""
    replace_file(folder / MEMORY, f"{json.dumps(asdict(memory), indent=1)}\n".encode())


def recall(folder: Path) -> Memory | None:
    """What `remember` wrote; None before the first start.

    Raises:
        OSError: it is there and cannot be read.
        ValueError: it is damaged.
    """
    path = folder / MEMORY
    return Memory(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def judge(notes: Mapping[int, Note], memory: Memory, step: int, asked: Asked) -> Verdict:
    """What a job does next.

    Args:
        notes: Of the ranks, by rank.
        memory: From before this start.
        step: Newest checkpoint now.
        asked: What the job was told meanwhile.
    """
    if notes.get(0, Note(None)).status == 0:
        return Verdict("done", "the run is finished")
    progress = f"checkpoint at step {step}" + (f", {memory.step} before" if memory.step else "")
    if asked == "end":
        return Verdict("leave", f"told to end; {progress if step else 'no checkpoint yet'}", memory.fruitless)
    final = {rank: note for rank, note in sorted(notes.items()) if note.status in FINAL}
    for rank, note in final.items():
        first_line = note.words.splitlines()[0] if note.words else "no words"
        return Verdict("give_up", f"exit {note.status} on rank {rank}: {first_line}; another start would not help")
    fruitless = 0 if step > memory.step else memory.fruitless + 1
    how = "its time is up" if asked == "time_limit" else _how(notes)
    if fruitless >= FRUITLESS:
        return Verdict("give_up", f"{how}; {fruitless} starts in a row have brought no later checkpoint", fruitless)
    return Verdict("requeue", f"{how}; {progress if step else 'no checkpoint yet'}", fruitless)


def _how(notes: Mapping[int, Note]) -> str:
    if not notes:
        return "no rank came to its first line"
    if any(note.status == RunStopped.exit_code for note in notes.values()):
        return "the run stopped on request"
    killed = sorted(rank for rank, note in notes.items() if note.status is None)
    failed = sorted(rank for rank, note in notes.items() if note.status not in (None, 0))
    parts = [
        f"{words} {', '.join(map(str, ranks[:8]))}{' …' if len(ranks) > 8 else ''}"
        for words, ranks in (("failed: rank", failed), ("killed or cut off: rank", killed))
        if ranks
    ]
    return "; ".join(parts)
