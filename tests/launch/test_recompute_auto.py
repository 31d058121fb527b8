"""`--recompute auto --micro_batch_tokens 0` as it is typed, where there is no GPU to measure: what it says and does."""

import json
from pathlib import Path

import pytest
import yaml
from conftest import Launch

CHOSEN = "--recompute auto: no GPU to measure, so all layers are recomputed, 8,192 tokens a micro-batch"


@pytest.fixture
def sft(tmp_path: Path, tiny_llama_dir: Path) -> list[str]:
    """Four steps on twelve ragged rows."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}?"},
                {"role": "assistant", "content": f"answer {n} " * (n + 1)},
            ]
        }
        for n in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--model_name_or_path", str(tiny_llama_dir), "--train_files", str(tmp_path / "rows.jsonl")),
        *("--eval_size", "3", "--compute_dtype", "fp32", "--lora_r", "16", "--max_seq_length", "256"),
        *("--global_batch_size", "5", "--max_steps", "4", "--learning_rate", "1e-3", "--save_steps", "2"),
        *("--data_cache_dir", str(tmp_path / "data")),
    ]


@pytest.fixture
def dpo(tmp_path: Path, tiny_llama_dir: Path) -> list[str]:
    """Two steps on eight pairs."""
    rows = [{"prompt": f"q{n}?", "chosen": f"answer {n} hurrah", "rejected": f"answer {n} whatev"} for n in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("--objective", "dpo", "--model_name_or_path", str(tiny_llama_dir)),
        *("--train_files", str(tmp_path / "pairs.jsonl"), "--compute_dtype", "fp32", "--lora_r", "8"),
        *("--max_seq_length", "128", "--global_batch_size", "4", "--max_steps", "2", "--learning_rate", "3e-3"),
        *("--data_cache_dir", str(tmp_path / "data"), "--reference_cache_dir", str(tmp_path / "reference")),
    ]


def losses(folder: Path) -> list[tuple[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(name, line[name]) for line in lines for name in ("train/loss", "eval/loss", "start/loss") if name in line]


@pytest.mark.parametrize(("objective", "nproc"), [("sft", 1), ("dpo", 2)])
def test_it_learns_what_the_explicit_choice_does_and_tells_which_that_is(
    objective: str, nproc: int, launch: Launch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    argv = request.getfixturevalue(objective)
    by_hand, by_itself = tmp_path / "by-hand", tmp_path / "by-itself"
    for folder, choice in ((by_hand, ("all", "8192")), (by_itself, ("auto", "0"))):
        options = ["--recompute", choice[0], "--micro_batch_tokens", choice[1], "--output_dir", str(folder)]
        done = launch([*argv, *options], launcher="torchrun", nproc=nproc)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (CHOSEN in done.stdout + done.stderr) == (folder is by_itself)
        assert "8,192 tokens at most, recomputed: all" in done.stdout
    assert losses(by_itself) == losses(by_hand)
    assert len(losses(by_itself)) >= 3
    asked = yaml.safe_load((by_itself / "config.yaml").read_text())
    assert (asked["recompute"], asked["micro_batch_tokens"]) == ("auto", 0)
    summary = json.loads((by_itself / "summary.json").read_text())
    assert (summary["recompute"], summary["micro_batch_tokens"]) == ("all", 8192)
    if objective == "sft":
        _goes_on_with_another_choice(launch, argv, by_itself)


def _goes_on_with_another_choice(launch: Launch, argv: list[str], folder: Path) -> None:
    longer = [*argv, "--output_dir", str(folder), "--resume", "auto", "--recompute", "cheap"]
    longer[longer.index("--max_steps") + 1] = "5"
    done = launch(longer)
    assert done.returncode == 0, done.stderr
    assert "--recompute is now cheap; it was auto" in done.stderr
    assert "--micro_batch_tokens is now 8192; it was 0" in done.stderr
