"""Lines on disk: appended whole, cleaned up after a kill, kept in memory while the disk is full."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from anima.tracking.line_file import LineFile


def run_script(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own: limits on file sizes and kills must not hit the test runner."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_every_line_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "x.jsonl")
    assert not file.path.exists()
    file.append("one")
    assert file.path.read_bytes() == b"one\n"
    file.append("二")
    assert file.path.read_text(encoding="utf-8") == "one\n二\n"
    file.close()
    file.close()


def test_second_writer_appends(tmp_path: Path) -> None:
    for text in ("a", "b"):
        file = LineFile(tmp_path / "x.jsonl")
        file.append(text)
        file.close()
    assert (tmp_path / "x.jsonl").read_bytes() == b"a\nb\n"


@pytest.mark.parametrize("torn", [b"c", b'{"step": 3, "tr', b"x" * 200_000])
@pytest.mark.parametrize("whole", [b"", b"a\nb\n"])
def test_torn_line_of_a_killed_process_is_cut_before_appending(tmp_path: Path, whole: bytes, torn: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(whole + torn)
    file = LineFile(path)
    file.append("new")
    file.close()
    assert path.read_bytes() == whole + b"new\n"


def test_file_without_torn_line_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a\n" * 100_000)
    LineFile(path).open()
    assert path.stat().st_size == 200_000


def test_lines_survive_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    done = run_script(
        """
        import os, signal, sys
        from pathlib import Path
        from anima.tracking.line_file import LineFile
        file = LineFile(Path(sys.argv[1]))
        for i in range(100):
            file.append(str(i))
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
    )
    assert done.returncode == -signal.SIGKILL
    assert path.read_text().split() == [str(i) for i in range(100)]


def test_full_disk_warns_once_and_counts_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.symlink_to("/dev/full")
    file = LineFile(path, max_pending_lines=3)
    for i in range(5):
        file.append(str(i))
    assert file.num_lost_lines == 2
    assert capsys.readouterr().err.splitlines() == [
        f"warning: cannot write {path}: No space left on device; training goes on, lines are kept and tried again"
    ]
    file.close()
    assert capsys.readouterr().err == f"warning: {path} lacks 5 lines that could not be written\n"


def test_lines_return_in_order_once_the_disk_has_room(tmp_path: Path) -> None:
    """A size limit cuts the third line in the middle, as a full disk does; lifted, all lines are there once."""
    path = tmp_path / "x.jsonl"
    done = run_script(
        """
        import resource, sys
        from pathlib import Path
        from anima.tracking.line_file import LineFile
        path = Path(sys.argv[1])
        file = LineFile(path)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))
        for i in range(5):
            file.append(f"line-{i:04d}")
        assert path.read_bytes() == b"line-0000\\nline-0001\\nline-", path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        file.append("line-0005")
        file.close()
        """,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert path.read_text().split() == [f"line-{i:04d}" for i in range(6)]
    assert done.stderr.count("warning") == 1


def test_folder_that_vanished_does_not_raise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = LineFile(tmp_path / "gone" / "x.jsonl")
    file.append("a")
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "gone").mkdir()
    file.append("b")
    file.close()
    assert file.path.read_bytes() == b"a\nb\n"


def test_open_reports_what_is_wrong_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LineFile(tmp_path / "gone" / "x.jsonl").open()
