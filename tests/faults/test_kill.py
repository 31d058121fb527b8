"""kill -9 at any moment, then --resume auto: the losses and the adapter of a run that nobody disturbed, bit by bit."""

import random
import signal
import time
from typing import Any

import pytest

from anima.train.checkpoint import newest_whole

SAVES = ("save.begin", "save.files", "save.manifest", "save.rename", "save.latest")
SEED = 5


def moments() -> list[str]:
    """Twelve seeded moments: each phase of a save, of a step on either rank, and two that only the clock knows."""
    draw = random.Random(SEED)
    chosen = [f"kill@{phase}:0:{draw.choice((2, 4, 6))}" for phase in SAVES]
    chosen += [f"kill@{phase}:{draw.randint(0, 1)}:{draw.randint(1, 8)}" for phase in ("step", "forward", "backward")]
    chosen += ["kill@save.files:0:8", f"kill@backward:1:{draw.choice((3, 5, 7))}"]
    return chosen + [f"after {draw.uniform(0.02, 0.4):.2f} s of training on rank {rank}" for rank in (0, 1)]


@pytest.mark.parametrize("moment", moments())
def test_a_killed_run_resumes_as_if_nothing_had_happened(undisturbed: Any, moment: str) -> None:
    name = moment.replace(" ", "-").replace("@", "-").replace(":", "-")
    if moment.startswith("kill@"):
        killed = undisturbed.run(name, fault=moment)
    else:
        seconds, rank = float(moment.split()[1]), int(moment[-1])

        def kill_later(processes: list[Any]) -> None:
            metrics = undisturbed.folder / name / "metrics.jsonl"
            while not (metrics.exists() and metrics.read_text()) and processes[0].exitcode is None:
                time.sleep(0.01)
            time.sleep(seconds)
            processes[rank].kill()

        # The last steps take a second however fast the machine is, so the run cannot end before it is killed.
        killed = undisturbed.run(name, fault="slow@step:*:7,slow@step:*:8", when=kill_later)
    assert -signal.SIGKILL in killed.codes, killed.output
    whole, _ = newest_whole(undisturbed.folder / name / "checkpoints")
    resumed = undisturbed.run(name, "--resume", "auto")
    assert resumed.codes == (0, 0), resumed.output
    assert f"resumed from {whole}, " in resumed.output if whole else "this is a fresh start" in resumed.output
    if moment.startswith("kill@"):
        _, phase, _, step = moment.replace("@", ":").split(":")
        done = int(whole.name.removeprefix("step-")) if whole else 0
        expected = int(step) if phase in ("save.rename", "save.latest") else int(step) - 1
        # The last save may still have been under way beside the training.
        assert expected - 3 <= done <= expected
    assert undisturbed.metrics(name) == undisturbed.metrics("undisturbed")
    assert undisturbed.adapter(name) == undisturbed.adapter("undisturbed")
