"""Processes that start side by side, which is mostly importing, and then work one behind the other.

    python tests/gpu/turns.py launch/train.py FLAGS…     imports what training needs, waits for its turn, and runs it

A process that waits takes no time from the one that works; it ends by itself when the one that started it is gone.
"""

import runpy
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SHOWN_OF_LOG = 4000


class Turn:
    """A process that waits for its turn; its output goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        """Start it; it has to call `wait_for_turn`."""
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=file, stderr=file, text=True
            )

    def take(self) -> float:
        """Let it work to its end, in seconds; ends this script with the end of its output if it fails."""
        began = time.perf_counter()
        self._process.communicate("go\n")
        if code := self._process.returncode:
            sys.exit(f"{self._log.read_text(errors='replace')[-SHOWN_OF_LOG:]}\n{self._log.stem} ended with {code}")
        return time.perf_counter() - began


def wait_for_turn() -> None:
    """Until `Turn.take`; ends this process where nobody is left to call it."""
    print("waits for its turn", flush=True)
    if not sys.stdin.readline():
        sys.exit("nobody is left to give a turn")


def main() -> None:
    """Import, wait, run a script of the repository."""
    sys.path.insert(0, str(REPOSITORY))
    from anima.model.console import quiet_libraries

    quiet_libraries(show_progress=False)  # before bitsandbytes is imported
    import anima.model.base_model
    import anima.model.lora
    import anima.train.choice
    import anima.train.engine
    import anima.train.results
    import anima.train.trainer  # noqa: F401  (for its imports alone)

    wait_for_turn()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
