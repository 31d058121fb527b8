"""Everything behind training, as a user types it, on a tiny model: NF4 folder, run, merge, chat, numbers, server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import launch.evaluate as evaluate
import launch.merge as merge
import launch.prequantize as prequantize
from anima.errors import AnimaError
from anima.evaluation.harness import check_harness
from anima.inference import chat

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("after")
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}?"}, {"role": "assistant", "content": f"a{n}."}]}
        for n in range(8)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    held_out = [*rows[:3], {"messages": [*rows[3]["messages"], *rows[4]["messages"]]}]
    (folder / "eval.jsonl").write_text("\n".join(json.dumps(row).replace("q", "Q") for row in held_out) + "\n")
    asked = [{"question_id": n, "text": f"What is {n}?", "category": "generic"} for n in range(3)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)) + "\n")
    choices = [
        {"subject": "law", "input": f"Intro.\n\nQ {n}\nA. a\nB. b\nC. c\nD. d\nAnswer:", "output": "ABCD"[n % 4]}
        for n in range(5)
    ]
    (folder / "choices.json").write_text(json.dumps(choices))
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> str:
    return str(tiny_llama_dir)


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_of(launch: Any, place: Path, model: str, name: str, ranks: int = 1) -> str:
    return ok(
        launch(
            [
                *(
                    "--model_name_or_path",
                    model,
                    "--output_dir",
                    str(place / name),
                    "--data_cache_dir",
                    str(place / "c"),
                ),
                *("--train_files", str(place / "train.jsonl"), "--eval_files", str(place / "eval.jsonl")),
                *("--lora_r", "4", "--learning_rate", "0.05", "--max_steps", "3", "--global_batch_size", "4"),
                *("--max_seq_length", "128", "--micro_batch_tokens", "256", "--compute_dtype", "fp32"),
                *("--eval_benchmarks", str(place / "choices.json")),
            ],
            launcher="torchrun" if ranks > 1 else "python",
            nproc=ranks,
        )
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_prequantise_train_merge_chat_evaluate(launch: Any, place: Path, tiny: str) -> None:
    nf4, adapter, merged = str(place / "nf4"), str(place / "sft" / "adapter"), str(place / "merged")
    made = ["--model_name_or_path", tiny, "--output_dir", nf4, "--compute_dtype", "fp32"]
    assert "read back and equal" in ok(launch(made, script="launch/prequantize.py"))
    again = launch(made, script="launch/prequantize.py")
    assert again.returncode == 2
    assert "there already" in again.stderr
    run_of(launch, place, nf4, "sft", ranks=2)
    run_of(launch, place, tiny, "sft-on-the-fly")
    on_nf4, on_the_fly = lines_of(place / "sft"), lines_of(place / "sft-on-the-fly")
    benchmark = [[row["benchmark/choices/loss"] for row in rows if "benchmark/choices/loss" in row] for rows in (on_nf4, on_the_fly)]  # fmt: skip # noqa: E501
    assert len(benchmark[0]) == 2
    assert benchmark[0] == pytest.approx(benchmark[1], rel=1e-4)
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in (on_nf4, on_the_fly)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    records = [json.loads((place / run / "adapter" / "anima.json").read_text()) for run in ("sft", "sft-on-the-fly")]
    assert records[0]["base_fingerprint"] == records[1]["base_fingerprint"]

    merge = ["--adapter", adapter, "--output_dir", merged, "--compute_dtype", "fp32"]
    text = ok(launch(merge, script="launch/merge.py"))
    assert "into the NF4 base as trained" in text
    assert "merged nf4 in bf16" in text

    chat = ["--adapter", adapter, "--max_new_tokens", "6", "--prompt", "q1?"]
    assert ok(launch(chat, script="launch/chat.py")).count("\n") == 1
    both = ok(launch([*chat, "--speaker", "all"], script="launch/chat.py"))
    assert [line.split("]")[0] for line in both.splitlines() if line.startswith("[")] == ["[base", "[sft"]
    refused = launch([*chat, "--chat_template", "alpaca"], script="launch/chat.py")
    assert refused.returncode == 2
    assert "template differs" in refused.stderr

    numbers = [
        *("--adapter", adapter, "--output_dir", str(place / "numbers"), "--eval_files", str(place / "eval.jsonl")),
        *("--mmlu_files", str(place / "choices.json"), "--questions", str(place / "questions.jsonl")),
        *("--max_new_tokens", "4"),
    ]
    text = ok(launch(numbers, script="launch/evaluate.py"))
    found = json.loads((place / "numbers" / "results.json").read_text())
    assert list(found) == ["base", "sft"]
    trained = [row for row in on_nf4 if "eval/loss" in row][-1]
    assert found["sft"]["held_out"]["loss"] == pytest.approx(trained["eval/loss"], rel=0.02)  # bf16 here, fp32 there
    assert found["sft"]["held_out"]["scored_tokens"] == 5 * len("a0.|")  # five answers of three bytes and a stop token
    assert found["sft"]["choices"]["questions"] == 5
    assert found["base"]["answers"]["made_now"] == 3
    assert "choices accuracy" in text
    more = ["--mmlu_examples", str(place / "choices.json"), "--mmlu_shots", "2", "--speakers", "sft"]
    ok(launch([*numbers, *more], script="launch/evaluate.py"))
    found = json.loads((place / "numbers" / "results.json").read_text())
    assert found["sft"]["answers"]["made_now"] == 0
    assert {"choices", "choices+2shot"} <= found["sft"].keys()
    assert found["sft"]["held_out"]["dropped"] == 0
    assert found["base"]["choices"]["questions"] == 5


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_files_have_a_size(size: str) -> None:
    for script, options in ((merge, ["--adapter", "a"]), (prequantize, ["--model_name_or_path", "m"])):
        with pytest.raises(AnimaError, match="shard_gib"):
            script.main([*options, "--output_dir", "o", "--shard_gib", size])


def test_what_cannot_be_measured_is_said_before_a_model_is_loaded(
    launch: Any, place: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["--model_name_or_path", tiny, "--output_dir", str(place / "bad")]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(chat, "load_speakers", lambda settings: pytest.fail("a model was loaded"))
    (place / "bad").mkdir()
    (place / "bad" / "results.json").write_text('{"base": 1')
    choices, eval_file = str(place / "choices.json"), str(place / "eval.jsonl")
    for more, message in (
        ([], "nothing to measure"),
        (["--mmlu_files", str(place / "questions.jsonl")], "no multiple-choice question"),
        (["--mmlu_files", "nowhere.json"], "no such file of questions"),
        (["--mmlu_files", choices, str(place / "again" / "choices.json")], "two files of one name"),
        (["--mmlu_files", choices, "--mmlu_questions", "0"], "--mmlu_questions"),
        (["--mmlu_examples", choices, "--eval_files", eval_file], "beside --mmlu_files"),
        (["--eval_files", str(place / "evil.jsonl")], "--eval_files"),
        (["--eval_files", eval_file, "--speakers", "bsae"], "no such model"),
        (["--eval_files", eval_file], "earlier results cannot be read"),
    ):
        with pytest.raises(AnimaError) as caught:
            evaluate.main([*start, *more])
        assert message in str(caught.value)
    for folder in (place / "eval.jsonl", place / "eval.jsonl" / "below"):
        with pytest.raises(AnimaError, match="cannot be written"):
            evaluate.main([*start[:2], "--output_dir", str(folder), "--eval_files", eval_file])
    if find_spec("lm_eval") is None:
        done = launch([*start, "--lm_eval_tasks", "arc_easy"], script="launch/evaluate.py")
        assert "lm-eval is not installed" in done.stderr


def test_the_harness_runs_local_tasks(launch: Any, place: Path, tiny: str) -> None:
    if find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed: pip install -e .[harness]")
    tasks = place / "tasks"
    tasks.mkdir()
    (tasks / "own.yaml").write_text(
        f"task: own_choices\ndataset_path: json\ndataset_kwargs:\n  data_files: {place / 'choices.json'}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: '{{input}}'\n"
        "doc_to_choice: ['A', 'B', 'C', 'D']\ndoc_to_target: output\nmetric_list:\n  - metric: acc\n"
    )
    argv = ["--model_name_or_path", tiny, "--output_dir", str(place / "harness"), "--lm_eval_tasks", "own_choices"]
    ok(launch([*argv, "--lm_eval_include", str(tasks)], script="launch/evaluate.py"))
    found = json.loads((place / "harness" / "results.json").read_text())
    assert 0 <= found["base"]["own_choices"]["acc"] <= 1
    with pytest.raises(AnimaError, match="knows no such task"):  # and before a model is loaded
        check_harness(["own_choices", "nothing_of_that_name"], str(tasks))


def test_transformers_serve_speaks_for_the_merged_model(place: Path) -> None:
    """After the first test: an OpenAI client against `transformers serve` with the folder as it is."""
    from openai import APIConnectionError, OpenAI

    folder = place / "merged"
    if not folder.is_dir():
        pytest.skip("needs the folder of the first test")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log_path = place / "serve.log"
    with log_path.open("w") as log:
        server = subprocess.Popen(
            [*command, "--device", "cpu"], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        deadline = time.monotonic() + 240
        while True:
            try:
                reply = client.chat.completions.create(
                    model=str(folder), messages=[{"role": "user", "content": "q1?"}], max_tokens=6, temperature=0
                )
                break
            except APIConnectionError:
                assert server.poll() is None, log_path.read_text()
                assert time.monotonic() < deadline, log_path.read_text()
                time.sleep(0.2)
        assert reply.choices[0].message.content is not None, log_path.read_text()
        assert reply.choices[0].message.role == "assistant"
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
