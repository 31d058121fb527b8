"""Signals, time limits and hangs: everything ends in time, with a checkpoint where one is possible, and says so."""

import os
import signal
import time
from typing import Any

import pytest

SLOW = "slow@step:*:*"
"""Half a second a step: time to send something in between."""


@pytest.mark.parametrize(
    ("kind", "rank", "words"), [("term", 1, "SIGTERM"), ("usr1", 0, "SIGUSR1"), ("int", 1, "Ctrl-C")]
)
def test_a_signal_to_one_rank_ends_all_after_the_step_with_a_checkpoint(
    undisturbed: Any, kind: str, rank: int, words: str
) -> None:
    name = f"signal-{kind}"
    stopped = undisturbed.run(name, "--save_steps", "0", fault=f"{kind}@step:{rank}:3")
    assert stopped.codes == (75, 75), stopped.output
    assert f"stopped: {words} after step " in stopped.output
    assert "goes on" in stopped.output
    assert "Traceback" not in stopped.output
    resumed = undisturbed.run(name, "--resume", "auto")
    assert resumed.codes == (0, 0), resumed.output
    assert "resumed from" in resumed.output
    assert undisturbed.metrics(name) == undisturbed.metrics("undisturbed")
    assert undisturbed.adapter(name) == undisturbed.adapter("undisturbed")


def test_max_hours_stops_early_enough_to_save(undisturbed: Any) -> None:
    began = time.monotonic()
    limit = 8.0
    options = ("--save_steps", "0", "--max_steps", "60", "--max_hours", str(limit / 3600))
    stopped = undisturbed.run("limit", *options, fault=SLOW)
    assert stopped.codes == (75, 75), stopped.output
    assert "--max_hours after step" in stopped.output
    assert time.monotonic() - began < limit + 5  # sixty steps would take half a minute


def test_a_second_ctrl_c_ends_at_once_without_a_save(undisturbed: Any) -> None:
    def again_and_again(processes: list[Any]) -> None:
        while "it fits" not in undisturbed.output("twice", 1) and processes[0].exitcode is None:
            time.sleep(0.05)
        while processes[0].exitcode is None:
            os.kill(processes[0].pid, signal.SIGINT)
            processes[0].join(1.2)

    fault = "int@step:0:2,hang@step:0:2"
    done = undisturbed.run("twice", "--save_steps", "0", fault=fault, when=again_and_again, timeout=60)
    assert done.codes[0] == 130, done.output
    assert "before the first step" not in done.output
    assert not (undisturbed.folder / "twice" / "checkpoints").exists()


def test_a_hung_rank_ends_all_with_the_stacks_of_every_thread(undisturbed: Any) -> None:
    done = undisturbed.run("hung", "--hang_timeout_minutes", "0.1", fault="hang@step:1:3", timeout=60)
    assert done.codes == (8, 8), done.output
    assert done.seconds < 30
    stacks = [(undisturbed.folder / "hung" / f"stacks-rank-{rank}.txt").read_text() for rank in (0, 1)]
    assert "faults.py" in stacks[1]  # the place where it hangs
    assert "sum_over_ranks" in stacks[0]  # the place where the other waits for it
    assert all("nothing has moved for 6 s (--hang_timeout_minutes), at step 3" in text for text in stacks)
    resumed = undisturbed.run("hung", "--resume", "auto")
    assert resumed.codes == (0, 0), resumed.output
    assert undisturbed.adapter("hung") == undisturbed.adapter("undisturbed")
