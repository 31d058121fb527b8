"""Merging against PEFT and stock transformers; in order; within little memory; refused where it would be wrong."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_adapter import trained
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import launch.merge as merge_script
from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.inference import merging
from anima.inference.adapter_folder import AdapterRecord, write_record
from anima.inference.merged_folder import MergeRequest
from anima.inference.merging import prepare_merge, run_merge
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.merge import NAMES, REQUANTIZED, Drift
from anima.model.prequantize import prequantize
from anima.model.tokenizer import load_tokenizer

CPU = torch.device("cpu")
FP32 = Compute(CPU, torch.float32, "test")
BF16 = Compute(CPU, torch.bfloat16, "test")
AS_TRAINED, INTO_ORIGINAL = NAMES["nf4"], NAMES["original"]


def merge(request: MergeRequest, compute: Compute = FP32) -> dict[str, Drift]:
    return run_merge(prepare_merge(request, compute), lambda done, total: None)


def rows(folder: Path) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in merging.COMPARED
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [torch.tensor([tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]


def measured(model: torch.nn.Module, reference: torch.nn.Module, ids: list[torch.Tensor]) -> tuple[float, float]:
    """Mean and largest difference of logits, straight from the two models."""
    with torch.no_grad():
        differences = [(model(row).logits.float() - reference(row).logits.float()).abs()[0] for row in ids]
    together = torch.cat(differences)
    return together.mean().item(), together.max().item()


@pytest.fixture(scope="module")
def adapter(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("adapter") / "adapter", tiny_llama_dir, seed=1)


def in_nf4(folder: Path) -> PreTrainedModel:
    """A model in NF4 with stock attention. (bitsandbytes' own CPU inference would compute in bf16.)"""
    base = load_base(ModelConfig(model_name_or_path=str(folder)), FP32)
    base.set_attn_implementation("sdpa")
    return base


@pytest.fixture(scope="module")
def reference(tiny_llama_dir: Path, adapter: Path) -> torch.nn.Module:
    """Base and adapter apart, with PEFT's own layers."""
    return PeftModel.from_pretrained(in_nf4(tiny_llama_dir), adapter).eval()


def test_the_reported_drift_is_what_stock_transformers_and_peft_compute(
    adapter: Path, reference: torch.nn.Module, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    drifts = merge(MergeRequest((str(adapter),), str(tmp_path / "merged"), shard_bytes=50_000))
    assert list(drifts) == [AS_TRAINED, INTO_ORIGINAL, REQUANTIZED]
    assert len(list((tmp_path / "merged").glob("model-*-of-*"))) > 1
    ids = rows(adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    mean, largest = measured(merged, reference, ids)
    assert drifts[AS_TRAINED].mean == pytest.approx(mean, rel=2e-3)
    assert drifts[AS_TRAINED].largest == pytest.approx(largest, rel=2e-2)
    mean, largest = measured(in_nf4(tmp_path / "merged"), reference, ids)
    assert drifts[REQUANTIZED].mean == pytest.approx(mean, rel=2e-3)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), adapter)
    mean, largest = measured(by_peft.merge_and_unload().to(torch.bfloat16).float(), reference, ids)
    assert drifts[INTO_ORIGINAL].mean == pytest.approx(mean, rel=2e-3)
    assert 1e-4 < drifts[AS_TRAINED].mean < 0.2 * drifts[INTO_ORIGINAL].mean  # rounding to bf16, and nothing else
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["drift"][AS_TRAINED]["mean"] == drifts[AS_TRAINED].mean


def test_in_fp32_the_merge_is_base_and_adapter(adapter: Path, reference: torch.nn.Module, tmp_path: Path) -> None:
    drifts = merge(MergeRequest((str(adapter),), str(tmp_path / "merged"), out_dtype=torch.float32))
    assert drifts[AS_TRAINED].largest < 1e-4
    assert drifts[AS_TRAINED].agreement == 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.float32
    assert measured(merged, reference, rows(adapter))[1] < 1e-4


def test_bf16_computation_reports_its_own_noise(adapter: Path) -> None:
    fine, coarse = merge(MergeRequest((str(adapter),), None)), merge(MergeRequest((str(adapter),), None), BF16)
    assert coarse[AS_TRAINED].mean > fine[AS_TRAINED].mean
    assert coarse[AS_TRAINED].mean < 0.1


def test_an_nf4_folder_gives_the_same_bytes(adapter: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    merge(MergeRequest((str(adapter),), str(tmp_path / "one")))
    merge(MergeRequest((str(adapter),), str(tmp_path / "two"), model_name_or_path=str(tmp_path / "nf4")))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    (tmp_path / "nf4" / "anima_nf4.json").unlink()
    request = MergeRequest((str(adapter),), None, model_name_or_path=str(tmp_path / "nf4"))
    prepared = prepare_merge(request, FP32)
    assert "not at hand" in prepared.notes[0]
    assert list(run_merge(prepared, lambda done, total: None)) == [AS_TRAINED, REQUANTIZED]
    with pytest.raises(ModelError, match="original is not where it was"):
        prepare_merge(replace(request, into="original"), FP32)
    named = replace(request, into="original", original=str(tiny_llama_dir), allow_drift=True)
    assert list(merge(named)) == [INTO_ORIGINAL, AS_TRAINED, REQUANTIZED]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_two_adapters_at_once_are_two_merges_one_after_the_other(
    tiny_llama_dir: Path, tmp_path: Path, quantization: str
) -> None:
    first = trained(tmp_path / "first", tiny_llama_dir, 1, quantization=quantization)
    merge(MergeRequest((str(first),), str(tmp_path / "sft")))
    second = trained(tmp_path / "second", tmp_path / "sft", 2, quantization=quantization)
    merge(MergeRequest((str(second),), str(tmp_path / "stepwise")))
    drifts = merge(MergeRequest((str(first), str(second)), str(tmp_path / "at_once")))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("stepwise", "at_once"))
    assert all(torch.equal(one[name], two[name]) for name in one | two)
    assert drifts[AS_TRAINED if quantization == "nf4" else INTO_ORIGINAL].mean < 0.05


def test_what_was_merged_into_is_said(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    folder = trained(tmp_path / "adapter", tiny_llama_dir, 1, quantization="none")
    merge_script.main(["--adapter", str(folder), "--output_dir", str(tmp_path / "merged"), "--device", "cpu"])
    assert "merged original in bf16" in capsys.readouterr().out  # there is no NF4 that it was trained over


def test_adapters_that_do_not_follow_each_other_are_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    first, second = (trained(tmp_path / str(seed), tiny_llama_dir, seed) for seed in (1, 2))
    request = MergeRequest((str(first), str(second)), None)
    with pytest.raises(ModelError, match="same base as the first") as caught:
        prepare_merge(request, FP32)
    assert f"--adapter {second} alone" in str(caught.value)
    assert "told to go on" in prepare_merge(replace(request, allow_mismatch=True), FP32).notes[0]


def test_layers_without_an_adapter_are_merged_as_they_were(tiny_llama_dir: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "adapter", tiny_llama_dir, 1, targets=("q_proj", "v_proj"))
    drifts = merge(MergeRequest((str(folder),), str(tmp_path / "merged"), out_dtype=torch.float32))
    assert drifts[AS_TRAINED].largest < 1e-4
    merge(MergeRequest((str(folder),), str(tmp_path / "orig"), into="original", out_dtype=torch.float32, max_drift=9))
    merged, source = load_file(tmp_path / "orig" / "model.safetensors"), load_file(tiny_llama_dir / "model.safetensors")
    changed = {name for name in source if not torch.equal(source[name], merged[name])}
    assert changed == {f"model.layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qv"}


def test_the_tokenizer_renders_and_stops_as_training_did(tiny_llama_dir: Path, tmp_path: Path) -> None:
    for template, stops in (("alpaca", [2]), ("model", [2, 4])):
        folder = trained(tmp_path / template, tiny_llama_dir, 1, template=template)
        source = tmp_path / f"base-{template}"
        shutil.copytree(tiny_llama_dir, source)
        (source / "generation_config.json").write_text('{"temperature": 0.7, "do_sample": true}')
        out = tmp_path / f"merged-{template}"
        merge(MergeRequest((str(folder),), str(out), model_name_or_path=str(source)))
        tokenizer = AutoTokenizer.from_pretrained(out)
        chat = [{"role": "user", "content": "One? 一"}]
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert asked in json.loads((folder / "anima.json").read_text())["rendering"]
        settings = GenerationConfig.from_pretrained(out)
        assert settings.eos_token_id == stops
        assert settings.temperature == 0.7
        assert "alpaca" in (out / "README.md").read_text() or template == "model"


def test_drift_past_the_limit_writes_nothing(adapter: Path, tmp_path: Path) -> None:
    request = MergeRequest((str(adapter),), str(tmp_path / "merged"), into="original", max_drift=0.01)
    with pytest.raises(ModelError, match="drift too far") as caught:
        merge(request)
    assert "--into nf4" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".merged.lock"]
    merge(replace(request, allow_drift=True))
    assert (tmp_path / "merged" / "config.json").is_file()


def test_an_adapter_of_another_base_is_told_by_hash_and_by_shape(
    adapter: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    model.save_pretrained(other)
    with pytest.raises(ModelError, match="another base") as caught:
        prepare_merge(MergeRequest((str(adapter),), None, model_name_or_path=str(other)), FP32)
    assert str(tiny_llama_dir) in str(caught.value)
    with pytest.raises(ModelError, match="not the one that the base comes from"):
        prepare_merge(MergeRequest((str(adapter),), None, original=str(other)), FP32)
    config = model.config
    config.intermediate_size = 192
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(ModelError, match="another shape"):
        prepare_merge(MergeRequest((str(adapter),), None, model_name_or_path=str(other)), FP32)
    config.num_hidden_layers, config.intermediate_size = 1, 128
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(ModelError, match="no such layer"):
        prepare_merge(MergeRequest((str(adapter),), None, model_name_or_path=str(other)), FP32)


def test_wrong_template_missing_files_other_kinds_and_folders_in_the_way(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}")
    with pytest.raises(ModelError, match="template differs"):
        prepare_merge(MergeRequest((str(copy),), None), FP32)
    shutil.copy(adapter / "chat_template.jinja", copy)
    with pytest.raises(ModelError, match="there already"):
        prepare_merge(MergeRequest((str(copy),), str(tmp_path)), FP32)
    stored = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(stored | {"use_dora": True}))
    with pytest.raises(ModelError, match="cannot be merged here"):
        prepare_merge(MergeRequest((str(copy),), None), FP32)
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks adapter_model\.safetensors"):
        prepare_merge(MergeRequest((str(copy),), None), FP32)
    write_record(copy, AdapterRecord("nowhere/at/all", "", "nf4", "model", "", "sft"))
    (copy / "anima.json").unlink()
    with pytest.raises(ModelError, match="does not say"):
        prepare_merge(MergeRequest((str(copy),), None), FP32)


MEASURE = """
import sys, threading
from pathlib import Path
import torch
from anima.inference import merging
from anima.inference.merged_folder import MergeRequest
from anima.inference.merging import prepare_merge, run_merge
from anima.model.compute import Compute
from anima.model.prequantize import prequantize
source, out = sys.argv[1:]
merging.COMPARED = merging.COMPARED[:1]  # activations are the same at any size, and would hide the matrices here
compute = Compute(torch.device("cpu"), torch.bfloat16, "")
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
def grown(work):
    seen = []
    work(lambda done, total: seen.append(anonymous()))
    return max(seen) - seen[0]
def merge(reach):
    request = MergeRequest((source + "-adapter",), out + "/merged", model_name_or_path=source, shard_bytes=2 << 20)
    run_merge(prepare_merge(request, compute), reach)
print(grown(lambda reach: prequantize(source, Path(out + "/nf4"), compute, shard_bytes=2 << 20, on_tensor=reach)))
print(grown(merge))
"""


def test_host_memory_is_a_few_matrices_and_a_shard(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(ModelConfig(model_name_or_path=str(tiny_llama_dir)))
    shape = {"vocab_size": 288, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=16, eos_token_id=2)).to(torch.bfloat16).save_pretrained(
        tmp_path / "big", max_shard_size="3MB"
    )
    tokenizer.save_pretrained(tmp_path / "big")
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")) / 2**20
    assert size > 25
    trained(tmp_path / "big-adapter", tmp_path / "big", 1)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "big"), str(tmp_path)],
        env={
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory goes back at once: what is measured is what is held
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    quantizing, merging_ = (float(line) for line in done.stdout.split()[-2:])
    print(f"source {size:.0f} MiB: quantising grows by {quantizing:.0f} MiB on its way, merging by {merging_:.0f} MiB")
    assert quantizing < 0.45 * size
    assert merging_ < 0.45 * size
