"""The DeepSpeed JSON: what is filled, what is refused, and that DeepSpeed itself accepts the result."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anima.config.deepspeed_json import merge_deepspeed
from anima.config.schema import BatchConfig, Config, DataConfig, ModelConfig, OptimizationConfig, OutputConfig
from anima.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = Config(
    model=ModelConfig(model_name_or_path="m"),
    data=DataConfig(train_files=("a",)),
    batch=BatchConfig(global_batch_size=12),
    optimization=OptimizationConfig(max_grad_norm=0.7),
    output=OutputConfig(output_dir="o"),
)
ZERO2: dict[str, Any] = {"stage": 2}


def merge(folder: Path, entries: object, *, bf16: bool = True) -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries, indent=2), encoding="utf-8")
    return merge_deepspeed(replace(CONFIG, deepspeed=str(path)), bf16=bf16)


def refusal(folder: Path, entries: object, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        merge(folder, entries, **options)
    return str(caught.value)


@pytest.mark.parametrize("bf16", [True, False])
def test_the_shipped_file_is_filled_from_the_config(bf16: bool) -> None:
    assert merge_deepspeed(CONFIG, bf16=bf16) == {
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": False,
            "reduce_scatter": True,
            "overlap_comm": False,
        },
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "gradient_clipping": 0.7,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def test_the_shipped_file_holds_no_number_but_the_stage() -> None:
    entries = json.loads((REPOSITORY / "ds_configs" / "zero2.json").read_text())
    assert entries["zero_optimization"].pop("stage") == 2
    leaves = [value for section in entries.values() for value in (section if isinstance(section, dict) else [section])]
    assert not [leaf for leaf in leaves if isinstance(leaf, int | float) and not isinstance(leaf, bool)]


def test_the_least_file_becomes_as_safe_as_the_shipped_one(tmp_path: Path) -> None:
    merged = merge(tmp_path, {"zero_optimization": ZERO2})
    assert merged["gradient_clipping"] == 0.7  # DeepSpeed clips at 1.0 where nothing is written
    assert merged["bf16"]["enabled"] is True
    assert merged["communication_data_type"] == "fp32"
    assert merged["zero_optimization"]["contiguous_gradients"] is False
    assert merged["data_types"]["grad_accum_dtype"] == "fp32"
    assert merged["zero_allow_untested_optimizer"] is True


def test_buckets_that_were_left_to_us_do_not_reach_deepspeed(tmp_path: Path) -> None:
    merged = merge(tmp_path, {"zero_optimization": {**ZERO2, "reduce_bucket_size": "auto"}})
    assert merged["zero_optimization"] == {**ZERO2, "contiguous_gradients": False, "overlap_comm": False}


def test_what_the_file_owns_is_kept(tmp_path: Path) -> None:
    own = {**ZERO2, "overlap_comm": False, "contiguous_gradients": False}
    entries = {"zero_optimization": own, "communication_data_type": "bf16", "steps_per_print": 10, "log_level": "info"}
    merged = merge(tmp_path, entries)
    assert merged["zero_optimization"] == own
    assert merged["communication_data_type"] == "bf16"
    assert merged["steps_per_print"] == 10


def test_the_same_number_in_both_places_is_no_contradiction(tmp_path: Path) -> None:
    entries = {"zero_optimization": ZERO2, "gradient_clipping": 0.7, "bf16": {"enabled": True}}
    assert merge(tmp_path, entries)["gradient_clipping"] == 0.7


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"gradient_clipping": 1.0}, ["gradient_clipping", "1.0", "--max_grad_norm 0.7", "ds.json:5"]),
        ({"train_batch_size": 12}, ["train_batch_size", "got:     12", "--global_batch_size 12", "ds.json:5"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["got:     4", "--micro_batch_tokens 8192", "ds.json:5"]),
        ({"gradient_accumulation_steps": 4}, ["got:     4", "--global_batch_size 12", "ds.json:5"]),
        ({"bf16": {"enabled": False}}, ["bf16.enabled", "false", "--compute_dtype auto is bf16 here", "ds.json:6"]),
        ({"bf16": {"enabled": 1}}, ["bf16.enabled", "got:     1"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "loss scaling", "ds.json:6"]),
        ({"bf16": {"check_grad_overflow": False}}, ["check_grad_overflow", "not finite"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "fp32"]),
        ({"communication_data_type": "fp16"}, ["communication_data_type", "fp16"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "mean"]),
        ({"zero_allow_untested_optimizer": False}, ["zero_allow_untested_optimizer", "bitsandbytes"]),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "--optimizer", "ds.json:5"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "--lr_scheduler_type"]),
        ({"activation_checkpointing": {}}, ["--recompute"]),
        ({"gradient_cliping": 0.7}, ["did you mean gradient_clipping", "ds.json:5"]),
        ({"bf16": True}, ["'bf16' holds entries of its own", "ds.json:5"]),
        ({"memory_breakdown": "auto"}, ["memory_breakdown", '"auto"']),
        ({"prescale_gradients": True}, ["prescale_gradients", "no such entry acts here"]),
    ],
)
def test_contradictions_name_both_values_and_both_places(
    tmp_path: Path, entries: dict[str, object], words: list[str]
) -> None:
    shown = refusal(tmp_path, {"zero_optimization": ZERO2, **entries})
    for word in words:
        assert word in shown


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        ({"stage": 3}, ["only ZeRO stage 2", "stage 3 would cut the frozen base", "ds.json:3"]),
        ({"stage": 1}, ["only ZeRO stage 2", "whole gradients"]),
        ({"stage": 0}, ["only ZeRO stage 2", "shards nothing"]),
        ({"stage": True}, ["only ZeRO stage 2"]),
        ({"overlap_comm": True}, ["must be written down"]),
        (None, ["must be written down"]),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, ["offloading is not supported", "ds.json:4"]),
        ({"stage": 2, "offload_param": {"device": "nvme"}}, ["offloading is not supported"]),
        ({"stage": 2, "elastic_checkpoint": True}, ["elastic_checkpoint", "8-bit"]),
        ({"stage": 2, "stage3_max_live_parameters": 1}, ["stage 3 only", "ds.json:4"]),
        ({"stage": 2, "overlap_com": True}, ["did you mean overlap_comm"]),
        ({"stage": 2, "reduce_bucket_size": 5e8}, ["reduce_bucket_size", "no effect", "in one piece"]),
        ({"stage": 2, "allgather_bucket_size": 2e8}, ["allgather_bucket_size", "no effect"]),
        ({"stage": 2, "contiguous_gradients": True}, ["contiguous_gradients", "one vector"]),
        ({"stage": 2, "overlap_comm": True}, ["overlap_comm", "once a step"]),
        ({"stage": 2, "reduce_scatter": False}, ["reduce_scatter", "its part"]),
    ],
)
def test_zero_is_stage_2_without_offloading(tmp_path: Path, zero: object, words: list[str]) -> None:
    shown = refusal(tmp_path, {} if zero is None else {"zero_optimization": zero})
    for word in words:
        assert word in shown


def test_precision_is_checked_against_what_the_run_really_does(tmp_path: Path) -> None:
    entries = {"zero_optimization": ZERO2, "bf16": {"enabled": True}}
    assert merge(tmp_path, entries, bf16=True)["bf16"]["enabled"] is True
    assert "--compute_dtype auto is fp32 here" in refusal(tmp_path, entries, bf16=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1,\n}', ["this is not JSON", "ds.json:2:1"]),
        ("", ["this is not JSON", "ds.json:1:1"]),
        ("[1]", ["an object", "list"]),
        ('{"bf16": {"enabled": true, "enabled": false}}', ["'enabled' stands twice"]),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: list[str]) -> None:
    shown = refusal(tmp_path, text)
    for word in words:
        assert word in shown


def test_a_missing_file_names_those_that_are_there() -> None:
    with pytest.raises(ConfigError) as caught:
        merge_deepspeed(replace(CONFIG, deepspeed="ds_configs/zero.json"), bf16=True)
    assert "ds_configs/zero2.json" in str(caught.value)
    assert "--deepspeed" in str(caught.value)


def test_the_default_is_found_from_any_folder_and_the_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert merge_deepspeed(CONFIG, bf16=True)["zero_optimization"]["overlap_comm"] is False
    own = tmp_path / "ds_configs" / "zero2.json"
    own.parent.mkdir()
    own.write_text(json.dumps({"zero_optimization": {**ZERO2, "load_from_fp32_weights": False}}))
    assert merge_deepspeed(CONFIG, bf16=True)["zero_optimization"]["load_from_fp32_weights"] is False


def test_deepspeed_reads_it_as_we_mean_it() -> None:
    runtime = pytest.importorskip("deepspeed.runtime.config")
    precision = pytest.importorskip("deepspeed.runtime.precision_config")
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    merged = merge_deepspeed(CONFIG, bf16=True)
    zero = zero_config.get_zero_config(merged)
    assert int(zero.stage) == 2
    assert zero.overlap_comm is zero.contiguous_gradients is False
    assert zero.elastic_checkpoint is False
    assert precision.get_bfloat16_config(merged).enabled is True
    assert precision.get_float16_config(merged).enabled is False
    assert str(runtime.get_communication_data_type(merged)) == "torch.float32"
    assert runtime.get_gradient_clipping(merged) == 0.7
    assert runtime.get_steps_per_print(merged) is None, "None is DeepSpeed's word for no lines of its own"
    assert runtime.get_zero_allow_untested_optimizer(merged) is True
    assert runtime.get_train_batch_size(merged) is None
    assert runtime.get_optimizer_name(merged) is None
