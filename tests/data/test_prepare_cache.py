"""The cache of the whole stage: what its key covers, who writes it, and what a killed or damaged one leaves."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import DataConfig
from anima.data import prepare as module
from anima.data import row_work
from anima.data.kinds import CONVERSATIONS
from anima.data.prepare import tokenise
from anima.data.templates import make_template
from anima.errors import DataError

PROCESS = Path(__file__).with_name("preparing_process.py")
REPOSITORY = Path(__file__).resolve().parents[2]
PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


def test_the_cache_is_found_again_under_other_names(run: Any, write_rows: Any, monkeypatch: Any) -> None:
    first = run(write_rows([*PAIRS, {"prompt": "x" * 2000, "completion": "y"}]))
    monkeypatch.setattr(row_work.RowEncoder, "encode", lambda *_: pytest.fail("read again"))
    moved = write_rows([*PAIRS, {"prompt": "x" * 2000, "completion": "y"}], "moved.jsonl")
    again = run(moved)
    assert (first.report.train_cache.reused, again.report.train_cache.reused) == (False, True)
    assert again.train.source(0) == f"{moved}:1"
    assert again.report.train.dropped["longer than max_seq_length"].first == [f"{moved}:21"]
    assert again.report.train.files == [moved]
    assert again.train.fingerprint == first.train.fingerprint


def test_everything_that_decides_tokens_is_in_the_key(
    run: Any, write_rows: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(PAIRS)
    other = write_rows(PAIRS[:19], "other.jsonl")
    keys = [
        run(*files, tokenizer=tokenizer, **options).report.train_cache.key
        for files, tokenizer, options in [
            ((file,), None, {}),
            ((other,), None, {}),
            ((file, other), None, {}),
            ((other, file), None, {}),
            ((file,), byte_tokenizer(eos="<|im_end|>"), {}),
            ((file,), byte_tokenizer(byte_tokenizer().chat_template.replace("\n", " ")), {}),
            ((file,), None, {"chat_template": "vicuna"}),
            ((file,), None, {"max_seq_length": 512}),
            ((file,), None, {"max_seq_length": 1024, "source_max_len": 512}),
            ((file,), None, {"max_seq_length": 1024, "target_max_len": 512}),
            ((file,), None, {"truncation": "trim_prompt"}),
            ((file,), None, {"train_on": "all"}),
            ((file,), None, {"chat_template": "vicuna", "train_on": "all"}),
            ((file,), None, {"dataset_format": "prompt_completion"}),
            ((file,), None, {"bad_rows": "drop"}),
        ]
    ]
    monkeypatch.setattr(module, "CODE_VERSION", module.CODE_VERSION + 1)
    keys.append(run(file).report.train_cache.key)
    assert len(set(keys)) == len(keys) == 16


def test_an_error_is_not_cached(run: Any, write_rows: Any, tmp_path: Path) -> None:
    wrong = write_rows([*PAIRS, {"prompt": "x"}])
    for _ in range(2):
        with pytest.raises(DataError, match="no key completion") as caught:
            run(wrong)
        assert caught.value.where == f"{wrong}:21"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_damaged_cache_says_what_to_remove(run: Any, write_rows: Any) -> None:
    folder = Path(run(write_rows(PAIRS)).report.train_cache.path)
    tokens = (folder / "tokens.arrow").read_bytes()
    whole = (folder / "report.json").read_bytes()
    for name, content in (("report.json", b"[]"), ("report.json", b""), ("tokens.arrow", tokens[: len(tokens) // 2])):
        (folder / "report.json").write_bytes(whole)
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged") as caught:
            run(write_rows(PAIRS))
        assert caught.value.fix == f"rm -r {folder}"


def test_damaged_lengths_say_what_to_remove(write_rows: Any, byte_tokenizer: Any, tmp_path: Path) -> None:
    config = DataConfig(train_files=(write_rows(PAIRS),), data_cache_dir=str(tmp_path / "cache"))
    tokenizer = byte_tokenizer()
    whole = tokenise(CONVERSATIONS, config, tokenizer, make_template("auto", tokenizer))[0]
    lengths = Path(whole.cache.path) / "lengths.npy"
    for damage in (lambda: lengths.write_bytes(b""), lambda: lengths.write_bytes(b"x" * 200), lengths.unlink):
        damage()
        with pytest.raises(DataError, match="damaged") as caught:
            whole.lengths()
        assert caught.value.fix == f"rm -r {whole.cache.path}"


def _process(file: str, cache: Path, delay: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROCESS), file, str(cache), str(delay)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "HOME": str(cache)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_processes_that_come_together_tokenise_once(write_rows: Any, tmp_path: Path) -> None:
    file = write_rows(PAIRS * 60)
    processes = [_process(file, tmp_path / "cache", 0.4) for _ in range(2)]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in processes]
    assert sorted(reused for reused, _, _ in answers) == [False, True]
    assert answers[0][1:] == answers[1][1:]
    assert answers[0][2] == 1200


def test_a_killed_process_leaves_no_half_cache(write_rows: Any, tmp_path: Path) -> None:
    file, cache = write_rows(PAIRS * 60), tmp_path / "cache"
    process = _process(file, cache, 1.0)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in cache.glob("*.tmp-*/tokens.arrow")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=10)
    assert [path for path in cache.iterdir() if path.is_dir() and ".tmp-" not in path.name] == []
    answer, _ = _process(file, cache, 0).communicate(timeout=60)
    assert json.loads(answer)[0] is False
    assert json.loads(answer)[2] == 1200
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
