"""The arena's memory survives what kills its writers."""

import subprocess
import sys
from pathlib import Path

import pytest

from anima.errors import ConfigError, DataError
from anima.evaluation.lines import LineWriter, read_lines, write_whole


def values(path: Path) -> list[dict[str, object]]:
    return [value for _, value in read_lines(path)]


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    assert values(path) == []
    with LineWriter(path) as writer:
        writer.append({"text": "zwei\nZeilen 二"})
        writer.append({"text": "lone \ud83d surrogate"})
    with LineWriter(path) as writer:
        writer.append({"n": 3})
    assert values(path) == [{"text": "zwei\nZeilen 二"}, {"text": "lone ? surrogate"}, {"n": 3}]


def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2, "text": "\xe4\xbd')
    assert values(path) == [{"n": 1}]
    with LineWriter(path) as writer:
        writer.append({"n": 3})
    assert path.read_bytes() == b'{"n": 1}\n{"n": 3}\n'


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(DataError, match="broken") as caught:
        values(path)
    assert caught.value.where == f"{path}:2"
    path.write_text("[1]\n")
    with pytest.raises(DataError, match="broken"):
        values(path)


def test_two_processes_never_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    take_it = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print('held', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", take_it, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process"):
            LineWriter(path)
    finally:
        other.kill()
        other.wait()
    LineWriter(path).close()


def test_a_whole_file_is_replaced_or_left(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_whole(path, "one")
    write_whole(path, "two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_whole(path / "below", "x")
