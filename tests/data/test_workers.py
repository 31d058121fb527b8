"""Tokenising in several processes: the same sequences in the same order, the same errors, and no orphans."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import DataConfig
from anima.data import workers
from anima.data.kinds import CONVERSATIONS, PAIRS
from anima.data.prepare import PreparedData, prepare
from anima.data.row_work import RowWork
from anima.data.templates import make_template
from anima.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = [{"prompt": f"question {i}", "completion": "answer " * (i % 90)} for i in range(1500)]


def _prepare(file: str, cache: Path, tokenizer: Any, count: int, **options: Any) -> PreparedData[Any]:
    config = DataConfig(
        train_files=(file,),
        data_cache_dir=str(cache),
        data_workers=count,
        max_seq_length=512,
        **options,
    )
    return prepare(config, tokenizer, seed=1)


def test_the_number_of_processes_changes_nothing(
    write_rows: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_BATCHES", 1)
    file = write_rows(ROWS)
    one, two = (_prepare(file, tmp_path / str(n), byte_tokenizer(), n, bad_rows="drop") for n in (1, 2))
    assert one.report.train == two.report.train
    assert one.report.train.dropped["bad row: the answer is empty (completion)"].rows == 17
    assert one.report.train.dropped["longer than max_seq_length"].rows > 100
    assert [one.train.source(i) for i in range(len(one.train))] == [two.train.source(i) for i in range(len(two.train))]
    for i in (0, 500, len(one.train) - 1):
        assert one.train[i].input_ids.tolist() == two.train[i].input_ids.tolist()
        assert one.train[i].labels.tolist() == two.train[i].labels.tolist()
    with pytest.raises(DataError, match="answer is empty") as caught:  # the first bad row, whoever meets it
        _prepare(write_rows([*ROWS[1:90], *ROWS[1:90] * 4, *ROWS], "b.jsonl"), tmp_path / "b", byte_tokenizer(), 2)
    assert str(caught.value.where).endswith("b.jsonl:446")


@pytest.mark.parametrize("cannot_travel", [threading.Lock(), lambda: None, type("Gone", (), {})()])
def test_a_tokenizer_that_cannot_travel_works_alone(
    cannot_travel: object, write_rows: Any, byte_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_BATCHES", 1)
    tokenizer = byte_tokenizer()
    tokenizer.cannot_travel = cannot_travel
    assert len(_prepare(write_rows(ROWS[1:20] * 30), tmp_path / "c", tokenizer, 2).train) == 570


def test_processes_end_with_a_parent_that_was_killed(tiny_llama_dir: Path, write_rows: Any, tmp_path: Path) -> None:
    rows = write_rows([{"prompt": "q " * 200, "completion": "a"}] * 20_000)
    code = (
        "import sys\nfrom transformers import AutoTokenizer\nfrom anima.config.schema import DataConfig\n"
        "from anima.data import workers\nfrom anima.data.prepare import prepare\nworkers.FIRST_BATCHES = 1\n"
        "if __name__ == '__main__':\n"
        "    config = DataConfig(train_files=(sys.argv[2],), data_cache_dir=sys.argv[3], data_workers=2)\n"
        "    prepare(config, AutoTokenizer.from_pretrained(sys.argv[1]), seed=1)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(script), str(tiny_llama_dir), rows, str(tmp_path / "cache")]
    process = subprocess.Popen(command, env=environment)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 90
    while len(found := children.read_text().split()) < 3:  # two workers, and the resource tracker of the library
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(f"/proc/{pid}/cmdline").exists() and _is_ours(pid) for pid in found):
        assert time.monotonic() < deadline, json.dumps(found)
        time.sleep(0.05)


def _is_ours(pid: str) -> bool:
    try:
        return b"multiprocessing" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_both_kinds_of_records_can_be_sent(byte_tokenizer: Any) -> None:
    """What cannot is tokenised in one process, with a warning that nobody should need."""
    for kind in (CONVERSATIONS, PAIRS):
        work = RowWork(kind, DataConfig(train_files=("a",)), byte_tokenizer(), make_template("auto", byte_tokenizer()))
        assert workers._can_be_sent(work)
