"""The progress bar in a log (plain lines, no control characters) and on a real pseudo-terminal."""

import io
import math
import os
import pty
import re
import select
import termios
import tty
import unicodedata

import pytest

from anima.tracking.progress import Progress, format_duration


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run_bar(stream: io.TextIOBase, steps: int, seconds_per_step: float, **options: bool) -> Progress:
    clock = Clock()
    progress = Progress(steps, stream=stream, clock=clock, **options)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        clock.now += seconds_per_step
        progress.update(step, loss=4 / step, tokens_per_second=1234.4, memory_gib=1.26)
    return progress


def test_line_tells_step_share_loss_speed_eta_memory() -> None:
    clock = Clock()
    progress = Progress(200, stream=io.StringIO(), clock=clock)
    for step in range(1, 51):
        clock.now += 2
        progress.update(step, loss=0.5, tokens_per_second=12345.6, memory_gib=1.26)
    # 150 steps of 2 s are left: 5 minutes.
    expected = "[#####...............] step  50/200  25%  loss 0.5000  12,346 tokens/s  ETA 5:00  1.3 GiB"
    assert progress.line() == expected


def test_log_gets_first_line_then_one_in_ten_seconds_then_the_last() -> None:
    stream = io.StringIO()
    run_bar(stream, 30, 1.0).close()
    lines = stream.getvalue().splitlines()
    assert [re.search(r"step +(\d+)/30", line)[1] for line in lines] == ["1", "11", "21", "30"]  # type: ignore[index]


def test_slow_steps_are_all_logged() -> None:
    stream = io.StringIO()
    run_bar(stream, 4, 60.0)
    assert stream.getvalue().count("\n") == 4


def test_log_never_holds_control_characters() -> None:
    stream = io.StringIO()
    progress = run_bar(stream, 30, 1.0)
    progress.message("the model said \x1b[2J\r\x07 and 你好")
    progress.close()
    assert {char for char in stream.getvalue() if unicodedata.category(char) == "Cc"} == {"\n"}
    assert "\\x1b[2J\\r\\x07 and 你好\n" in stream.getvalue()


def test_eta_of_a_resumed_run_counts_its_own_steps_only() -> None:
    clock = Clock()
    progress = Progress(1000, 900, stream=io.StringIO(), clock=clock)
    assert "ETA ?" in progress.line()
    clock.now += 3
    progress.update(901)
    assert "ETA 4:57" in progress.line()  # 99 steps of 3 s


def test_what_came_before_the_first_step_does_not_count() -> None:
    clock = Clock()
    progress = Progress(41, stream=io.StringIO(), clock=clock)
    clock.now += 60  # a first evaluation
    progress.begin()
    clock.now += 3
    progress.update(1)
    assert "ETA 2:00" in progress.line()  # 40 steps of 3 s


def test_eta_follows_the_last_steps() -> None:
    clock = Clock()
    progress = Progress(200, stream=io.StringIO(), clock=clock)
    for step in range(1, 101):
        clock.now += 30 if step <= 50 else 1
        progress.update(step)
    assert "ETA 1:40" in progress.line()


def test_missing_numbers_keep_their_last_value() -> None:
    progress = Progress(10, stream=io.StringIO())
    progress.update(1)
    assert "loss" not in progress.line()
    progress.update(2, loss=1.25)
    progress.update(3)
    assert "loss 1.2500" in progress.line()
    progress.update(4, loss=math.nan)
    assert "loss nan" in progress.line()


def test_other_ranks_are_silent() -> None:
    stream = io.StringIO()
    progress = run_bar(stream, 3, 20.0, is_main=False)
    progress.message("x")
    progress.close()
    assert stream.getvalue() == ""


def test_full_disk_under_the_log_does_not_raise() -> None:
    with open("/dev/full", "w", buffering=1) as full:
        progress = run_bar(full, 3, 20.0)
        progress.message("x")
        progress.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # let the file close


def screen(text: str, columns: int) -> list[str]:
    """What a terminal shows after `text`: carriage return, newline and erase-line are all it has to know."""
    rows, row, column = [[" "] * columns], 0, 0
    for part in re.findall(r"\x1b\[2K|[\s\S]", text):
        if part == "\x1b[2K":
            rows[row] = [" "] * columns
        elif part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            rows += [[" "] * columns]
        else:
            assert column < columns, "the line wrapped"
            rows[row][column] = part
            column += 1
    return ["".join(cells).rstrip() for cells in rows]


def read_terminal(leader: int) -> str:
    """Everything that was written; the kernel hands it over in pieces."""
    data = b""
    while select.select([leader], [], [], 0.3)[0]:
        data += os.read(leader, 1 << 16)
    return data.decode()


BAR = "[....................] "
NUMBERS = "step   4/200   2%  loss 0.5000  800 tokens/s  ETA 3:16  2.0 GiB"


@pytest.mark.parametrize(("columns", "line"), [(100, BAR + NUMBERS), (70, NUMBERS), (40, NUMBERS[:39])])
def test_terminal_shows_one_line_that_is_rewritten(columns: int, line: str) -> None:
    leader, follower = pty.openpty()
    tty.setraw(follower)
    termios.tcsetwinsize(follower, (24, columns))
    with open(follower, "w", encoding="utf-8") as terminal:
        clock = Clock()
        progress = Progress(200, stream=terminal, clock=clock)
        for step in (1, 2, 3):
            clock.now += 1
            progress.update(step, loss=1000.0, tokens_per_second=800.0, memory_gib=2.0)
        progress.message("step 3: saved")
        clock.now += 1
        progress.update(4, loss=0.5)  # shorter than the line before: nothing of that may stay
        progress.close()
        progress.close()
        shown = screen(read_terminal(leader), columns)
    os.close(leader)
    assert shown == ["step 3: saved", line.rstrip(), ""]


def test_terminal_is_redrawn_ten_times_a_second_at_most() -> None:
    leader, follower = pty.openpty()
    tty.setraw(follower)
    with open(follower, "w", encoding="utf-8") as terminal:
        run_bar(terminal, 1000, 0.001)
        written = read_terminal(leader)
    os.close(leader)
    assert 10 <= written.count("step") <= 12


def test_default_stream_is_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(1).update(1)
    assert "step 1/1 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (90061, "1d 01:01"), (math.inf, "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
