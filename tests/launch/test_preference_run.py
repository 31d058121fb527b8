"""Preference training as it is typed: starts at ln 2, learns, and says what it was compared with."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Launch

LN2 = math.log(2)


def write_pairs(path: Path, count: int, first: int = 0) -> Path:
    """Questions whose chosen answer ends in a cheer and whose rejected one does not; equally long."""
    rows = [
        {"prompt": f"question {i}?", "chosen": f"answer {i} hurrah", "rejected": f"answer {i} whatev"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def argv(tmp_path: Path, tiny_llama_dir: Path) -> list[str]:
    """A run of six steps of four pairs; the output folder is still missing."""
    options = {
        "objective": "dpo",
        "model_name_or_path": tiny_llama_dir,
        "compute_dtype": "fp32",
        "lora_r": 8,
        "train_files": write_pairs(tmp_path / "train.jsonl", 14),
        "eval_files": write_pairs(tmp_path / "eval.jsonl", 5, first=100),
        "max_seq_length": 128,
        "global_batch_size": 4,
        "micro_batch_tokens": 256,
        "learning_rate": "3e-3",
        "max_steps": 6,
        "eval_steps": 3,
        "optimizer": "adamw_torch",
        "sample_prompts": "question 1?",
        "sample_max_new_tokens": 4,
        "data_cache_dir": tmp_path / "data",
        "reference_cache_dir": tmp_path / "reference",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_a_run_its_successor_and_their_references(argv: list[str], launch: Launch, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done = launch([*argv, "--output_dir", str(first)], launcher="torchrun", nproc=2)
    assert done.returncode == 0, done.stderr
    lines = metrics(first)
    assert lines[0]["step"] == 0
    assert lines[0]["start/loss"] == pytest.approx(LN2, abs=1e-5)
    assert lines[0]["start/max_logp_gap"] < 1e-3
    steps = [line for line in lines if "train/loss" in line]
    assert steps[0]["train/loss"] == pytest.approx(LN2, abs=1e-5)
    assert steps[-1]["train/loss"] < 0.5
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in held_out] == [0, 3, 6]
    assert held_out[0]["eval/loss"] == pytest.approx(LN2, abs=1e-5)
    assert held_out[-1]["eval/rewards/accuracies"] == 1.0
    assert held_out[-1]["eval/rewards/margins"] > 0.3
    assert held_out[-1]["eval/kl"] > 0
    summary = json.loads((first / "summary.json").read_text("utf-8"))
    assert summary["num_sequences"] == 24
    assert summary["reference"].startswith("base ")
    record = json.loads((first / "adapter" / "anima.json").read_text("utf-8"))
    assert (record["objective"], record["reference"]) == ("dpo", f"base {record['base_fingerprint']}")
    assert "chosen answer is the longer one in 0% of the pairs (equally long in 100%)" in done.stderr
    labels = [json.loads(line)["label"] for line in (first / "samples.jsonl").read_text("utf-8").splitlines()]
    assert labels == ["policy", "reference"] * 3

    done = launch([*argv, "--output_dir", str(second), "--adapter_path", str(first / "adapter")])
    assert done.returncode == 0, done.stderr
    lines = metrics(second)
    assert lines[0]["start/loss"] == pytest.approx(LN2, abs=1e-5)  # against the adapter it starts from
    # The policy is the first run's result: its log-probabilities go on where that one ended.
    resumed = next(line for line in lines if "eval/loss" in line)
    assert resumed["eval/logps/chosen"] == pytest.approx(held_out[-1]["eval/logps/chosen"], abs=1e-2)
    record = json.loads((second / "adapter" / "anima.json").read_text("utf-8"))
    assert record["reference"].startswith("adapter ")


def test_the_reference_is_asked_once_and_a_wrong_one_is_refused(
    argv: list[str], launch: Launch, tmp_path: Path
) -> None:
    at = argv.index("--max_steps")
    short = [*argv[:at], "--max_steps", "1", *argv[at + 2 :], "--output_dir"]
    done = launch([*short, str(tmp_path / "none")], script="launch/reference_logps.py")
    assert done.returncode == 0, done.stderr
    assert "reference, train: 14 of 14 pairs\n" in done.stderr
    assert not (tmp_path / "none").exists()

    done = launch([*short, str(tmp_path / "one")])
    assert done.returncode == 0, done.stderr
    assert "reference, train: 4 of 4 pairs known" in done.stderr
    assert "reference, eval: 5 of 5 pairs known" in done.stderr

    # Numbers of another model under this one's key, as a mistake in the key would give them.
    for path in (tmp_path / "reference").glob("*/part-*.npz"):
        with np.load(path) as stored:
            numbers, logps = stored["numbers"], stored["logps"]
        np.savez(path, numbers=numbers, logps=logps + np.float32([0, 3]))
    done = launch([*short, str(tmp_path / "two")])
    assert done.returncode == 3
    assert "before its first step the policy is not its reference" in done.stderr
    assert "Traceback" not in done.stderr


def test_supervised_runs_have_no_reference_to_ask(argv: list[str], launch: Launch, tmp_path: Path) -> None:
    rows = tmp_path / "sft.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    options = ["--model_name_or_path", argv[argv.index("--model_name_or_path") + 1], "--train_files", str(rows)]
    done = launch([*options, "--output_dir", str(tmp_path / "x")], script="launch/reference_logps.py", timeout=120)
    assert done.returncode == 2
    assert "compares the policy with no other model" in done.stderr
    assert "Traceback" not in done.stderr
