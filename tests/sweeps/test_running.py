"""launch/sweep.py run: whole sweeps, stops and crashes, with a program of milliseconds in place of a training.

A sweep of real trainings is in test_wandb_sweep.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from workspace import environment, make_workspace

from anima.sweeps.guard import children, dying_with_us

TRAIN = '''
"""Stands for a launcher with a training: writes what a run leaves, as fast as it can."""
import json, os, signal, sys, time
from pathlib import Path

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
notes, out = Path(os.environ["ANIMA_EXIT_DIR"]), Path(flags["output_dir"])
(notes / "rank-0").write_text("running\\n")
out.mkdir(parents=True, exist_ok=True)

def stop(number, frame):
    time.sleep(0.5)
    (out / "saved").touch()
    (notes / "rank-0").write_text("75\\nstopped\\n")
    sys.exit(1)

if flags["lora_r"] == "32" and not (out / "saved").exists():
    signal.signal(signal.SIGUSR1, stop)
    (out / "slow").touch()
    time.sleep(60)
if flags["lora_r"] == "13":
    print("something broke")
    sys.exit(1)
loss = abs(float(flags["learning_rate"]) - 3e-4) * 1000
rows = [{"step": step, "eval/loss": loss + 1 - step} for step in (0, 1)]
(out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
(out / "flags.json").write_text(json.dumps({**flags, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "")}))
(notes / "rank-0").write_text("0\\n")
'''
LAUNCH = """
import subprocess, sys
# As launchers are: SIGUSR1 would end it, and torchrun's ranks have sessions of their own.
sys.exit(subprocess.call([sys.executable, *sys.argv[1:]], start_new_session=True))
"""
SWEEP = """\
program: launch/train.py
method: grid
metric: {{name: eval/loss}}
parameters:
  learning_rate: {{values: [0.0001, 0.0003, 0.001]}}
  lora_r: {{values: {ranks}}}
command: [{python}, launch_fast.py, train_fast.py, "${{program}}", --config, {config}, --tracker, wandb, "${{args}}"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_workspace(tmp_path / "workspace")
    (made / "train_fast.py").write_text(TRAIN)
    (made / "launch_fast.py").write_text(LAUNCH)
    return made


def write(folder: Path, ranks: list[int], **changes: str) -> None:
    text = SWEEP.format(ranks=ranks, python=sys.executable, config="launch/configs/quickstart_sft.yaml")
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "sweep.yaml").write_text(text)


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/sweep.py", "run", "sweep.yaml", *words]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, *words: str) -> tuple[int, str]:
    process = start(folder, *words)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs/sweeps/sweep/trials.jsonl").read_text().splitlines()]


def test_a_grid_runs_to_its_end_and_the_best_is_on_top(folder: Path) -> None:
    write(folder, [8, 16], command="run_cap: 2\ncommand")
    code, output = run(folder, "--at_once", "2", "--", "--max_steps", "3")
    assert code == 0, output
    assert "without effect here, only on W&B: run_cap" in output
    assert "the grid has 6 trials" in output
    table = output.split("state\n")[1].splitlines()
    assert table[0].split()[1:4] == ["0", "0.0003", "8"]  # |3e-4 - 3e-4| * 1000, the last value of the metric
    assert [row.split()[2] for row in table[:6]] == ["0.0003", "0.0003", "0.0001", "0.0001", "0.001", "0.001"]
    sweep = folder / "runs" / "sweeps" / "sweep"
    picture = (sweep / "sweep.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    flags = json.loads((sweep / "trial-003" / "flags.json").read_text())
    assert flags["tracker"] == "jsonl"  # no account
    assert flags["max_steps"] == "3"
    assert flags["resume"] == "auto"
    assert flags["output_dir"].endswith("trial-003")
    again, output = run(folder)
    assert again == 0
    assert "begins" not in output  # nothing is left to do


def test_a_stopped_sweep_saves_and_the_same_command_goes_on(folder: Path) -> None:
    write(folder, [32])
    process = start(folder, "--trials", "2")
    slow = folder / "runs/sweeps/sweep/trial-001/slow"
    deadline = time.monotonic() + 60
    while not slow.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "SIGTERM: running trials save and stop" in output
    assert "the same command goes on" in output
    assert [(event["number"], event["state"]) for event in events(folder)] == [(1, "running"), (1, "stopped")]
    assert events(folder)[-1]["status"] == 75  # it had time to save, and to say so
    (folder / "runs/sweeps/sweep/trial-002").mkdir()
    (folder / "runs/sweeps/sweep/trial-002" / "saved").touch()
    code, output = run(folder, "--trials", "2")
    assert code == 0, output
    assert "trial-001 finished" in output
    assert "trial-002 finished" in output
    assert [event["number"] for event in events(folder)] == [1, 1, 1, 1, 2, 2]


def test_a_killed_sweep_takes_its_trial_again(folder: Path) -> None:
    write(folder, [8])
    (folder / "runs/sweeps/sweep").mkdir(parents=True)
    trial = {"number": 1, "parameters": {"learning_rate": 0.0003, "lora_r": 8}, "state": "running", "worker": "local.0"}
    (folder / "runs/sweeps/sweep/trials.jsonl").write_text(json.dumps(trial) + '\n{"number": 2, "para')
    code, output = run(folder, "--trials", "2")
    assert code == 0, output
    assert output.count("trial-001 begins: learning_rate 0.0003") == 1
    assert output.count("trial-002 finished") == 1


def processes_of(folder: Path) -> list[str]:
    """Commands of the processes that live and have their home in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            words = (process / "cmdline").read_text().split("\0")
            if words != [""] and f"HOME={folder / 'home'}" in (process / "environ").read_text().split("\0"):
                found.append(" ".join(words))
    return found


def test_kill_9_of_a_sweep_ends_its_trial_at_once_and_the_same_command_goes_on(folder: Path) -> None:
    write(folder, [32])
    process = start(folder, "--trials", "1")
    trial = folder / "runs/sweeps/sweep/trial-001"
    deadline = time.monotonic() + 60
    while not (trial / "slow").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running = processes_of(folder)
    for part in ("launch/sweep.py", "sweeps/guard.py", "launch_fast.py train_fast.py", "python train_fast.py"):
        assert any(part in command for command in running), (part, running)
    process.kill()
    output, _ = process.communicate(timeout=60)
    deadline = time.monotonic() + 10  # of the 60 seconds that the trial would go on
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(folder) == []
    assert "the sweep has died" in (folder / "runs/sweeps/sweep/trial-001.log").read_text()
    (trial / "saved").touch()  # it is fast now
    code, output = run(folder, "--trials", "1")
    assert code == 0, output
    assert "trial-001 finished" in output
    assert processes_of(folder) == []


def test_signals_to_the_whole_job_leave_the_guard(tmp_path: Path) -> None:
    """Slurm sends them to all processes of a step; the trial may still be saving when its sweep is killed then."""
    with (tmp_path / "log").open("wb") as log:
        sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
        with dying_with_us(sleeper, log):  # left while it runs: as if this process had died
            guard = next(child for child in children(os.getpid()) if child != sleeper.pid)
            deadline = time.monotonic() + 30
            ignored = 0
            while not ignored and time.monotonic() < deadline:
                status = Path(f"/proc/{guard}/status").read_text()
                ignored = int(status.split("SigIgn:")[1].split()[0], 16) >> (signal.SIGUSR2 - 1) & 1
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(guard, number)
            assert sleeper.poll() is None
        assert sleeper.wait(10) == -signal.SIGKILL


def test_a_trial_that_is_over_is_left_alone(tmp_path: Path) -> None:
    """Its number may be another process's by then: whoever leads that group must live."""
    with (tmp_path / "log").open("wb") as log:
        leader = subprocess.Popen(["sh", "-c", "sleep 60 & exit 0"], start_new_session=True)
        with dying_with_us(leader, log):
            leader.wait()
        os.killpg(leader.pid, 0)  # what it left behind is there
        os.killpg(leader.pid, signal.SIGKILL)
    assert (tmp_path / "log").read_bytes() == b""


def test_three_failures_in_a_row_end_it_with_what_was_printed(folder: Path) -> None:
    write(folder, [13])
    code, output = run(folder)
    assert code == 3, output
    assert output.count("something broke") == 3
    assert "3 trials in a row have failed" in output


def test_another_sweep_does_not_mix_with_the_first(folder: Path) -> None:
    write(folder, [8])
    assert run(folder, "--trials", "1")[0] == 0
    write(folder, [8, 16])
    code, output = run(folder, "--trials", "2")
    assert code == 2
    assert "--sweep_dir runs/sweeps/sweep-2" in output


def test_a_mistake_is_told_before_any_trial(folder: Path) -> None:
    write(folder, [8], lora_r="lora_rr")
    code, output = run(folder)
    assert code == 2
    assert "sweep.yaml:6" in output
    assert "did you mean lora_r?" in output
    assert not (folder / "runs").exists()


def test_show_of_a_mistyped_folder_makes_none(folder: Path) -> None:
    write(folder, [8])
    command = [sys.executable, "launch/sweep.py", "show", "sweep.yaml", "--sweep_dir", "runs/typo"]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder / "home"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "there are no trials" in done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("words", [("--sweep_dir", "sweep.yaml"), ("--sweep_dir", "sweep.yaml/x"), ("--seed", "-1")])
def test_a_folder_that_cannot_be_and_a_seed_below_zero_are_mistakes(folder: Path, words: tuple[str, str]) -> None:
    write(folder, [8])
    code, output = run(folder, *words, "--trials", "1")
    assert code == 2, output
    assert words[0] in output
    assert "Traceback" not in output
