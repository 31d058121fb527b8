"""--compute_dtype fp8 and fp8_backward as they are typed, emulated on a CPU: both objectives learn, the reference in
the policy's format."""

import json
import math
from pathlib import Path

import pytest
from conftest import Launch


@pytest.mark.parametrize(("objective", "form"), [("sft", "fp8"), ("dpo", "fp8"), ("dpo", "fp8_backward")])
def test_a_run_in_fp8(objective: str, form: str, launch: Launch, tiny_llama_dir: Path, tmp_path: Path) -> None:
    if objective == "sft":
        rows = [{"prompt": f"question {i}?", "completion": f"answer {i} hurrah"} for i in range(16)]
    else:
        rows = [{"prompt": f"question {i}?", "chosen": f"{i} hurrah", "rejected": f"{i} whatev"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = {
        "objective": objective,
        "model_name_or_path": tiny_llama_dir,
        "compute_dtype": form,
        "lora_r": 8,
        "train_files": tmp_path / "rows.jsonl",
        "max_seq_length": 128,
        "global_batch_size": 4,
        "micro_batch_tokens": 256,
        "learning_rate": "3e-3",
        "max_steps": 6,
        "output_dir": tmp_path / "run",
        "data_cache_dir": tmp_path / "data",
        "reference_cache_dir": tmp_path / "reference",
    }
    done = launch([word for name, value in options.items() for word in (f"--{name}", str(value))])
    assert done.returncode == 0, done.stderr
    assert f"{form} emulated on the CPU" in done.stderr
    assert "stay out of fp8" not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    if objective == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=0.01)
    assert json.loads((tmp_path / "run" / "summary.json").read_text("utf-8"))["compute_dtype"] == form


@pytest.mark.parametrize("form", ["fp8", "fp8_backward"])
def test_fp8_needs_an_nf4_base(form: str, launch: Launch, tiny_llama_dir: Path, tmp_path: Path) -> None:
    flags = ["--model_name_or_path", str(tiny_llama_dir), "--compute_dtype", form, "--quantization", "none"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "q", "completion": "a"}\n' * 4, "utf-8")
    done = launch([*flags, "--train_files", str(rows), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"])
    assert done.returncode == 2
    assert "--quantization nf4" in done.stderr
