"""How a command ends: a user's mistake as a few lines and exit 2, once, although every rank meets it.

Knows nothing of what the command does.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence

from anima.errors import AnimaError, RunStopped

RANK_0_SPEAKS_FIRST_SECONDS = 8.0
"""Every rank meets a user's mistake; the launcher ends the others as soon as rank 0 has exited."""


def run_command(command: Callable[[Sequence[str]], None]) -> None:
    """Run `command` on the arguments of this process and exit with its status.

    Anything but an AnimaError keeps its traceback. Exit codes: 0 done, 1 a bug or a fault of the machine, 2 a mistake
    in the input, 3 training stopped by its numbers, 7 out of memory, 8 hung, 75 stopped on request and saved, 130
    Ctrl-C without a save.
    """
    try:
        command(sys.argv[1:])
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.flush()
            print(f"stopped: {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_code)
    except AnimaError as error:
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
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
