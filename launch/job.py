"""What a job on a cluster asks before and after it starts ranks; for slurm/*.sbatch rather than for people.

python launch/job.py begin FOLDER [--prepare] -- FLAGS OF launch/train.py     prints train, or finished
python launch/job.py end FOLDER --asked nothing|time_limit|end              prints done, requeue, give_up or leave
python launch/job.py trial FOLDER                                           prints none, done, stopped or failed

FOLDER holds the job's logs, its memory (job.json), and the notes of its ranks. The word goes to stdout, all that is
meant for people to stderr.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from anima.cluster import outcome
from anima.config.cli import parse_config
from anima.config.schema import Config
from anima.entry import run_command
from anima.errors import RunStopped
from anima.tracking.terminal import warn

LOG_LINES = 15


def main(argv: Sequence[str]) -> None:
    """Read the command line and do what the word says."""
    parser = argparse.ArgumentParser(description="What a job does before and after training.")
    parser.add_argument("word", choices=("begin", "end", "trial"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true", help="begin: read and tokenise the data here, once")
    parser.add_argument("--asked", choices=("nothing", "time_limit", "end"), default="nothing")
    own, flags = (list(argv[: argv.index("--")]), list(argv[argv.index("--") + 1 :])) if "--" in argv else (argv, [])
    options = parser.parse_args(own)
    if options.word == "begin":
        print(begin(options.folder, flags, prepare=options.prepare))
    elif options.word == "end":
        print(end(options.folder, options.asked))
    else:
        print(trial(options.folder))


def begin(folder: Path, flags: Sequence[str], *, prepare: bool) -> str:
    """Find mistakes and finished runs before any rank starts; tokenise the data, so that no rank has to."""
    config, _ = parse_config(flags)
    if outcome.is_finished(config):
        say(f"{config.output.output_dir} holds the finished run: nothing to do")
        return "finished"
    if not config.output.save_steps:
        warn("--save_steps is 0: a node that dies takes all steps since the last stop with it; --save_steps 200, say")
    memory = outcome.recall(folder)
    fruitless = memory.fruitless if memory else 0
    outcome.remember(
        folder,
        outcome.Memory(config.output.output_dir, outcome.newest_step(config.output.output_dir), fruitless),
    )
    if prepare:
        with contextlib.redirect_stdout(sys.stderr):
            tokenise(config)
    return "train"


def tokenise(config: Config) -> None:
    """Fill the token cache; nothing here needs a GPU."""
    from anima.data.prepare import prepare_records
    from anima.model.console import quiet_libraries
    from anima.train.run_folder import check_run_folder
    from launch.data import load, records_of

    os.environ["DS_ACCELERATOR"] = "cpu"
    quiet_libraries(show_progress=False)
    check_run_folder(config.output.output_dir, config.resume)
    tokenizer, template = load(config)
    prepared = prepare_records(records_of(config), config.data, tokenizer, seed=config.seed, template=template)
    for line in prepared.report.lines():
        say(line)


def end(folder: Path, asked: outcome.Asked) -> str:
    """What the job does next, and the reasons; the launcher's last words where ranks were cut off."""
    memory = outcome.recall(folder)
    if memory is None:
        return "give_up"
    notes = outcome.read_notes(folder / "exit")
    verdict = outcome.judge(notes, memory, outcome.newest_step(memory.output_dir), asked)
    say(f"{verdict.next.replace('_', ' ')}: {verdict.why}")
    stopped = any(note.status == RunStopped.exit_code for note in notes.values())
    if verdict.next in ("requeue", "give_up") and asked == "nothing" and not stopped:
        show_logs(folder)
    outcome.remember(folder, replace(memory, fruitless=verdict.fruitless))
    return verdict.next


def trial(folder: Path) -> str:
    """How the trial of a sweep ended: none (there was none left), done, stopped or failed."""
    notes = outcome.read_notes(folder / "exit")
    if not notes:  # the agent writes the parameters of a trial before it starts it
        began = (folder / "exit" / "began").stat().st_mtime
        parameters = [path.stat().st_mtime for path in folder.glob("wandb/sweep-*/config-*.yaml")]
        return "failed" if max(parameters, default=0.0) >= began else "none"
    status = notes[min(notes)].status
    return "done" if status == 0 else "stopped" if status == RunStopped.exit_code else "failed"


def show_logs(folder: Path) -> None:
    """The last lines of all logs that the terminal has not shown."""
    for path in sorted(folder.glob("*.log")):
        if path.name != "rank-0.log" and (lines := path.read_text(encoding="utf-8", errors="replace").splitlines()):
            say(f"--- {path}, last lines")
            print("\n".join(lines[-LOG_LINES:]), file=sys.stderr)


def say(text: str) -> None:
    """A line for people."""
    print(f"job: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
