"""summary.json and the table at the end of a run."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest

from anima.tracking.sample import Sample
from anima.tracking.summary import RunSummary, format_summary, write_summary
from anima.tracking.terminal import text_width

CHAT = "python launch/chat.py --model_name_or_path models/smollm2-135m-instruct --adapter_path out/quickstart/adapter"

SUMMARY = RunSummary(
    objective="sft",
    model="models/smollm2-135m-instruct",
    steps=120,
    num_sequences=1920,
    num_tokens=100_000,
    supervised_tokens=37_000,
    seconds=271.3,
    tokens_per_second=368.6,
    peak_memory_gib=(1.234, 1.25),
    world_size=2,
    device="cpu",
    compute_dtype="fp32",
    quantization="nf4",
    micro_batch_tokens=6144,
    recompute="10",
    train_loss_first=3.2141,
    train_loss_last=1.0023,
    eval_loss_before=2.9871,
    eval_loss_after=1.4561,
    eval_loss_best=1.4011,
    best_step=100,
    samples_before=(Sample("你是谁？", "I am\x1b[2J a model."), Sample("Only before?", "yes")),
    samples_after=(Sample("你是谁？", "我是一个小助手，" * 12), Sample("Only after?", "")),
    adapter_dir="out/quickstart/adapter",
    output_dir="out/quickstart",
    files=("adapter/", "config.yaml", "metrics.jsonl", "summary.json"),
    next_commands=(CHAT,),
    versions={"torch": "2.13.0", "deepspeed": "0.19.8"},
)


def test_json_holds_every_field_and_is_strict(tmp_path: Path) -> None:
    summary = dataclasses.replace(SUMMARY, train_loss_last=math.nan, tokens_per_second=math.inf)
    write_summary(tmp_path / "summary.json", summary)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    values = json.loads(text)
    assert set(values) == {item.name for item in dataclasses.fields(RunSummary)}
    assert values["steps"] == 120
    assert values["peak_memory_gib"] == [1.234, 1.25]
    assert values["samples_before"][0] == {"prompt": "你是谁？", "answer": "I am\x1b[2J a model.", "label": ""}
    assert (values["train_loss_last"], values["tokens_per_second"]) == ("nan", "inf")
    assert "NaN" not in text
    assert "Infinity" not in text


def test_writing_leaves_one_readable_file_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_summary(path, SUMMARY)
    assert os.listdir(tmp_path) == ["summary.json"]
    assert json.loads(path.read_text())["steps"] == 120
    assert path.stat().st_mode & 0o777 == 0o644


def test_failed_writing_keeps_the_old_file_and_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.mkdir()  # a folder cannot be replaced by a file: os.replace fails after the text was written
    with pytest.raises(OSError, match="summary"):
        write_summary(path, SUMMARY)
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("columns", [80, 90, 100])
def test_table_fits_its_columns_and_keeps_commands_whole(columns: int) -> None:
    lines = format_summary(SUMMARY, columns).splitlines()
    assert f"  {CHAT}" in lines
    assert max(text_width(line) for line in lines if CHAT not in line) == columns
    assert all(char == "\n" or char.isprintable() for char in "\n".join(lines))


def test_table_tells_the_numbers() -> None:
    table = format_summary(SUMMARY)
    for expected in (
        "sft of models/smollm2-135m-instruct: 120 steps done",
        "1,920 sequences, 100,000 tokens, 37,000 of them supervised (37%)",
        "369 tokens/s, 4:31 of training",
        "2 ranks on cpu, NF4 base, fp32 compute",
        "6,144 tokens at most, recomputed: 10 layers",
        "rank 0: 1.23 GiB, rank 1: 1.25 GiB",
        "3.2141 -> 1.0023",
        "2.9871 -> 1.4561 (before -> after), best 1.4011 at step 100",
        "torch==2.13.0",
        "out/quickstart/adapter",
        "metrics.jsonl",
    ):
        assert expected in table


def test_answers_stand_under_their_question() -> None:
    lines = [line.rstrip() for line in format_summary(SUMMARY, 80).splitlines()]
    start = lines.index("question       你是谁？")
    # 65 columns are left for the text: 32 Chinese characters, and a comma may not open a line.
    assert lines[start + 1] == "  before       I am\\x1b[2J a model."
    assert lines[start + 2] == "  after        " + ("我是一个小助手，" * 4)
    assert lines[start + 3] == "               " + ("我是一个小助手，" * 4)
    later = lines[start + 5 :]
    assert later[:3] == ["", "question       Only before?", "  before       yes"]
    assert later[3:6] == ["", "question       Only after?", "  after        (empty)"]


def test_best_before_the_first_step_is_told() -> None:
    table = format_summary(dataclasses.replace(SUMMARY, eval_loss_best=2.9871, best_step=0))
    assert "best 2.9871 at step 0" in table


def test_run_without_held_out_data_samples_or_files() -> None:
    bare = dataclasses.replace(
        SUMMARY,
        eval_loss_before=None,
        eval_loss_after=None,
        eval_loss_best=None,
        best_step=None,
        samples_before=(),
        samples_after=(),
        files=(),
        next_commands=(),
        versions={},
        num_tokens=0,
        supervised_tokens=0,
        quantization="none",
        train_loss_first=None,
        train_loss_last=None,
    )
    table = format_summary(bare)
    assert "held-out" not in table
    assert "question" not in table
    assert "Next" not in table
    assert "16-bit base" in table
    assert "- -> -" in table


def test_many_ranks_become_a_range() -> None:
    peaks = (*(30.0 + rank / 10 for rank in range(63)), 29.5)
    table = format_summary(dataclasses.replace(SUMMARY, world_size=64, peak_memory_gib=peaks))
    assert "29.50 to 36.20 GiB over 64 ranks (most on rank 62)" in table
