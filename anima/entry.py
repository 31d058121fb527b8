"""How a command ends: a user's mistake as a few lines and exit 2, once, although every rank meets it.

Knows nothing of what the command does. Launchers turn every exit status of a rank into 1; where ANIMA_EXIT_DIR names a
folder, each rank leaves a note of its own status there, for the job that must know.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from anima.disk import replace_file
from anima.errors import AnimaError, RunStopped

EXIT_DIR = "ANIMA_EXIT_DIR"
"""Variable with the folder for notes."""
RUNNING = "running"
"""The note of a rank that has begun; it stays where a rank is killed."""

RANK_0_SPEAKS_FIRST_SECONDS = 8.0
"""Every rank meets a user's mistake; the launcher ends the others as soon as rank 0 has exited."""


def run_command(command: Callable[[Sequence[str]], None]) -> None:
    """Run `command` on the arguments of this process and exit with its status.

    Anything but an AnimaError keeps its traceback. Exit codes: 0 done, 1 a bug or a fault of the machine, 2 a mistake
    in the input, 3 training stopped by its numbers, 7 out of memory, 8 hung, 75 stopped on request and saved, 130
    Ctrl-C without a save.
    """
    leave_note(RUNNING)
    try:
        command(sys.argv[1:])
    except RunStopped as stopped:
        leave_note(str(stopped.exit_code), str(stopped))
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.flush()
            print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_code)
    except AnimaError as error:
        leave_note(str(error.exit_code), str(error))
        rank = os.environ.get("RANK", "0")
        prefix = "error: "
        if rank != "0":
            if error.on_every_rank:
                time.sleep(RANK_0_SPEAKS_FIRST_SECONDS)
            prefix = f"error on rank {rank}: "
        sys.stdout.flush()
        print(prefix + str(error), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        leave_note("130")
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
    except SystemExit as ended:
        leave_note(str(ended.code or 0))
        raise
    except BaseException:
        leave_note("1")
        raise
    else:
        leave_note("0")


def leave_note(status: str, words: str = "") -> None:
    """Write this rank's exit status and what it said into the folder that ANIMA_EXIT_DIR names, if it does."""
    folder = os.environ.get(EXIT_DIR)
    if not folder:
        return
    note = Path(folder) / f"rank-{os.environ.get('RANK', '0')}"
    try:
        # Names of files need not be UTF-8; half a letter in a message must not cost the message.
        replace_file(note, f"{status}\n{words}\n".encode(errors="backslashreplace"))
    except OSError as error:
        print(f"warning: {note}: {error.strerror}; the job may not learn how this run ended", file=sys.stderr)
