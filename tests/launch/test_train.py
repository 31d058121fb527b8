"""launch/train.py as it is typed: every launcher, the same losses; what lies in the output folder; bad input."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import Launch

SENTENCES = [
    ("What is a lighthouse?", "A tower with a light that guides ships at night."),
    ("海水为什么是咸的？", "因为河流把盐带进了海。"),
    ("Name a star.", "Polaris, which stands above the pole."),
    ("How deep is the sea?", "About three thousand seven hundred metres in the mean."),
    ("Say yes.", "Yes."),
    ("Who are you?", "The keeper of the light."),
]


GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "sft_tiny_llama.json"
"""Losses of `arguments` on the tiny Llama, as first measured; a change that should not alter numbers must meet them."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve rows of ragged length."""
    path = tmp_path / "rows.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a * (1 + repeat)}]}
        for repeat in range(2)
        for q, a in SENTENCES
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def arguments(model: Path, rows: Path, output_dir: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--train_files", str(rows), "--output_dir", str(output_dir)),
        *("--eval_size", "3", "--compute_dtype", "fp32", "--lora_r", "16", "--max_seq_length", "256"),
        *("--global_batch_size", "5", "--micro_batch_tokens", "300", "--max_steps", "4", "--learning_rate", "1e-3"),
        *("--save_steps", "2", "--eval_steps", "2", "--sample_prompts", "Who are you?", "--sample_max_new_tokens", "4"),
    ]


def metrics(output_dir: Path) -> dict[str, list[float]]:
    """The values of every metric in order."""
    found: dict[str, list[float]] = {}
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).items():
            found.setdefault(name, []).append(value)
    return found


def test_all_launchers_give_the_same_losses_and_a_whole_output_folder(
    launch: Launch, tiny_llama_dir: Path, rows: Path, tmp_path: Path
) -> None:
    curves = {}
    for launcher, nproc in (("python", 1), ("torchrun", 2), ("deepspeed", 2)):
        output_dir = tmp_path / f"{launcher}-{nproc}"
        done = launch(arguments(tiny_llama_dir, rows, output_dir), launcher=launcher, nproc=nproc)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stdout + done.stderr
        curves[launcher] = metrics(output_dir)
    for name in ("train/loss", "eval/loss", "train/grad_norm"):
        assert len(curves["python"][name]) == (3 if name == "eval/loss" else 4)
        for launcher in ("torchrun", "deepspeed"):
            assert curves[launcher][name] == pytest.approx(curves["python"][name], rel=2e-5), (name, launcher)
    assert curves["python"]["train/loss"][-1] < curves["python"]["train/loss"][0]
    golden = json.loads(GOLDEN.read_text())
    for name, values in golden.items():
        assert curves["python"][name] == pytest.approx(values, rel=1e-3), name

    output_dir = tmp_path / "torchrun-2"
    written = {path.name for path in output_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "adapter", "checkpoints"} <= written
    assert {path.name for path in (output_dir / "checkpoints").iterdir()} == {"step-2", "step-4", "latest"}
    summary = json.loads((output_dir / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["num_sequences"] == 20
    assert len(summary["peak_memory_gib"]) == summary["world_size"] == 2
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    _the_adapter_works_in_plain_transformers(tiny_llama_dir, output_dir / "adapter")
    _a_used_folder_is_refused(launch, tiny_llama_dir, rows, output_dir)
    _the_saved_config_reproduces_the_run(launch, output_dir, tmp_path)


def _the_adapter_works_in_plain_transformers(model: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from anima.data.records import Message
    from anima.inference.chat import load_answerer

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    moved = [p for name, p in plain.named_parameters() if "lora_B" in name]
    assert all(bool(p.abs().max() > 0) for p in moved)
    assert len(moved) == 14
    assert tokenizer.chat_template
    answers = load_answerer(str(adapter), device="cpu").answer([[Message("user", "Hi")]], max_new_tokens=3)
    assert len(answers) == 1


def _a_used_folder_is_refused(launch: Launch, model: Path, rows: Path, output_dir: Path) -> None:
    before = (output_dir / "summary.json").read_bytes()
    done = launch(arguments(model, rows, output_dir))
    assert done.returncode == 2
    assert "holds another run" in done.stderr
    assert "Traceback" not in done.stderr
    assert (output_dir / "summary.json").read_bytes() == before


def _the_saved_config_reproduces_the_run(launch: Launch, output_dir: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    done = launch(["--config", str(output_dir / "config.yaml"), "--output_dir", str(again), "--max_steps", "2"])
    assert done.returncode == 0, done.stderr
    assert metrics(again)["train/loss"] == pytest.approx(metrics(output_dir)["train/loss"][:2], rel=2e-5)


def test_one_mistake_is_one_error_on_two_ranks(
    launch: Launch, tiny_llama_dir: Path, rows: Path, tmp_path: Path
) -> None:
    rows.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "and?"}]}\n')
    done = launch(arguments(tiny_llama_dir, rows, tmp_path / "out"), launcher="deepspeed", nproc=2)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "rows.jsonl:13" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


BAD_INPUT = {
    "missing file": (["--train_files", "nowhere.jsonl"], "nowhere.jsonl"),
    "empty file": (["--train_files", "EMPTY"], "empty"),
    "wrong JSON": (["--train_files", "BROKEN"], "broken.jsonl:2"),
    "missing key": (["--train_files", "KEYLESS"], "keyless.jsonl:1"),
    "nothing supervised": (["--max_seq_length", "4", "--micro_batch_tokens", "4"], "no row is left"),
    "no chat template": (["--model_name_or_path", "PLAIN", "--chat_template", "model"], "template"),
    "unknown target": (["--lora_target_modules", "c_attn"], "q_proj"),
    "typo in YAML": (["--config", "TYPO"], "learning_rate"),
    "contradicting JSON": (["--deepspeed", "CLIP"], "gradient_clipping"),
    "no CUDA": (["--device", "cuda"], "GPU"),
    "too long for a micro-batch": (["--max_seq_length", "512"], "micro_batch_tokens"),
    "unknown flag": (["--learning_rte", "1"], "learning_rate"),
    "wandb without a key": (["--tracker", "wandb"], "WANDB_MODE=offline"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_told_before_anything_is_written(
    case: str, tiny_llama_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, for speed: what `run_command` turns into a few lines and exit 2."""
    from anima.errors import AnimaError
    from launch.train import main

    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    extra, expected = BAD_INPUT[case]
    files = {
        "EMPTY": ("empty.jsonl", ""),
        "BROKEN": ("broken.jsonl", rows.read_text().splitlines()[0] + "\n{nonsense\n"),
        "KEYLESS": ("keyless.jsonl", '{"question": "a", "answer": "b"}\n'),
        "TYPO": ("typo.yaml", "learning_rte: 1e-4\n"),
        "CLIP": ("clip.json", '{"zero_optimization": {"stage": 2}, "gradient_clipping": 7.0}'),
    }
    argv = [*arguments(tiny_llama_dir, rows, tmp_path / "out"), "--data_cache_dir", str(tmp_path / "cache")]
    for place, value in zip(extra[::2], extra[1::2], strict=True):
        if value in files:
            name, content = files[value]
            (tmp_path / name).write_text(content)
            value = str(tmp_path / name)
        if value == "PLAIN":
            value = str(_without_template(tiny_llama_dir, tmp_path))
        if place in argv:
            argv[argv.index(place) + 1] = value
        else:
            argv += [place, value]
    with pytest.raises(AnimaError) as caught:
        main(argv)
    assert caught.value.exit_code == 2
    assert expected in str(caught.value)
    assert not (tmp_path / "out").exists()


def _without_template(model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    folder.mkdir()
    for path in model.iterdir():
        if path.name != "chat_template.jinja":
            (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_dry_run_prints_a_config_that_parses_again(launch: Launch, tmp_path: Path) -> None:
    done = launch(["--config", "launch/configs/anima_33b_sft.yaml", "--dry_run"])
    assert done.returncode == 0, done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = launch(["--config", str(tmp_path / "again.yaml"), "--dry_run"])
    assert again.stdout.replace(str(tmp_path), "") == done.stdout
    assert '"stage": 2' in done.stdout


def test_a_loss_that_is_not_finite_skips_the_step_and_then_stops(
    launch: Launch, tiny_llama_dir: Path, rows: Path, tmp_path: Path
) -> None:
    """An absurd learning rate makes the adapter overflow; the run ends by itself, says where, and exits 3."""
    argv = arguments(tiny_llama_dir, rows, tmp_path / "out")
    argv[argv.index("--learning_rate") + 1] = "1e30"
    argv[argv.index("--max_steps") + 1] = "20"
    argv[argv.index("--save_steps") + 1] = "0"
    done = launch(argv)
    assert done.returncode == 3, done.stderr
    assert "not finite" in done.stderr
    reports = sorted((tmp_path / "out" / "not_finite").glob("step-*.json"))
    assert len(reports) >= 5
    assert "rows.jsonl:" in reports[0].read_text()
    assert any(not math.isfinite(float(value)) for value in metrics(tmp_path / "out")["train/loss"])


def test_the_quickstart_config_trains_the_real_small_model(
    launch: Launch, small_model_dir: Path, tmp_path: Path
) -> None:
    config = ["--config", "launch/configs/quickstart_sft.yaml", "--model_name_or_path", str(small_model_dir)]
    short = ["--max_steps", "6", "--global_batch_size", "4", "--sample_prompts", "Who are you?"]
    limits = ["--sample_max_new_tokens", "4", "--save_steps", "0", "--output_dir", str(tmp_path / "out")]
    limits += ["--tracker", "wandb"]  # offline, as the fixture's environment says
    done = launch([*config, *short, *limits], launcher="torchrun", nproc=2)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.5
    assert [sample["prompt"] for sample in summary["samples_after"]] == ["Who are you?"]
    assert "python launch/chat.py --adapter" in done.stdout
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 1  # rank 0 alone
