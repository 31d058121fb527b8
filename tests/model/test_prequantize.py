"""NF4 folders: the bits of quantising on the fly, for us and for stock transformers; nothing half written, ever."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.nf4 import fingerprint, nf4_layers
from anima.model.prequantize import prequantize, source_of
from anima.model.stored_base import open_base
from anima.model.weights import model_folder

CPU = torch.device("cpu")
FP32 = Compute(CPU, torch.float32, "test")
BF16 = Compute(CPU, torch.bfloat16, "test")
REPOSITORY = Path(__file__).resolve().parents[2]


def dense(model) -> dict[str, torch.Tensor]:
    return {name: dequantize_4bit(layer.weight.data, layer.weight.quant_state) for name, layer in nf4_layers(model).items()}  # fmt: skip # noqa: E501


def saved_as(folder: Path, source: Path, dtype: torch.dtype, shard: str = "5GB") -> Path:
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [FP32, BF16])
def test_the_bits_are_those_of_quantising_on_the_fly(
    tiny_llama_dir: Path, tmp_path: Path, stored: torch.dtype, compute: Compute
) -> None:
    source = saved_as(tmp_path / "source", tiny_llama_dir, stored, shard="100KB")
    made = prequantize(str(source), tmp_path / "nf4", compute, shard_bytes=60_000)
    assert len(list((tmp_path / "nf4").glob("model-*-of-*.safetensors"))) > 1
    on_the_fly = load_base(ModelConfig(model_name_or_path=str(source)), compute)
    before = load_base(ModelConfig(model_name_or_path=str(tmp_path / "nf4")), compute)
    assert made.fingerprint == fingerprint(on_the_fly) == fingerprint(before)
    expected, found = dense(on_the_fly), dense(before)
    assert len(found) == 14
    assert all(torch.equal(expected[name], found[name]) for name in expected | found)
    for (name, one), (_, other) in zip(on_the_fly.named_parameters(), before.named_parameters(), strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


def test_stock_transformers_loads_it_and_computes_the_same(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from anima.model.nf4 import nf4_settings

    prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    fresh = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=nf4_settings(torch.float32), dtype=torch.float32
    )
    ids = torch.tensor([[5, 6, 7, 200, 9]])
    assert torch.equal(stock(ids).logits, fresh(ids).logits)
    assert stock.config.quantization_config.bnb_4bit_use_double_quant


def test_the_tokenizer_comes_along_and_the_source_is_remembered(tiny_llama_dir: Path, tmp_path: Path) -> None:
    prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    assert (tmp_path / "nf4" / "tokenizer.json").read_bytes() == (tiny_llama_dir / "tokenizer.json").read_bytes()
    assert source_of(tmp_path / "nf4") == str(tiny_llama_dir)
    assert source_of(tiny_llama_dir) is None


def test_a_tied_head_stays_tied(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tied = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "tokenizer.json").write_text("{}")
    made = prequantize(str(tmp_path / "tied"), tmp_path / "nf4", FP32)
    stored = load_file(tmp_path / "nf4" / "model.safetensors")
    assert "lm_head.weight" not in stored
    base = load_base(ModelConfig(model_name_or_path=str(tmp_path / "nf4")), FP32)
    assert base.get_output_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()
    assert made.fingerprint == fingerprint(base)


def test_loaded_matrices_are_mapped_pages_of_the_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """Clean private pages of a mapped file are the page cache's own: ranks of one machine share them."""
    prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    base = load_base(ModelConfig(model_name_or_path=str(tmp_path / "nf4")), FP32)
    for layer in nf4_layers(base).values():
        place = layer.weight.data.data_ptr()
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(bound, 16) for bound in line.split()[0].split("-"))
            if first <= place < last:
                assert line.endswith("nf4/model.safetensors")
                break
        else:
            pytest.fail("the matrix lies nowhere")


def test_a_killed_conversion_leaves_no_folder_and_the_next_one_is_whole(tiny_llama_dir: Path, tmp_path: Path) -> None:
    program = f"""
import sys, time
from pathlib import Path
import torch
from anima.model.compute import Compute
from anima.model.prequantize import prequantize
def on_tensor(done, total):
    if done * 2 > total:
        Path({str(tmp_path / "halfway")!r}).touch()
        time.sleep(600)
prequantize({str(tiny_llama_dir)!r}, Path({str(tmp_path / "nf4")!r}), Compute(torch.device("cpu"), torch.float32, ""),
            shard_bytes=20000, on_tensor=on_tensor)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "halfway").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ModelError, match="another process"):
            prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "nf4").exists()
    assert list((tmp_path / ".nf4.partial").glob("part-*"))
    prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    assert not (tmp_path / ".nf4.partial").exists()
    open_base(str(tmp_path / "nf4"))


def test_a_full_disk_and_a_flipped_bit_leave_nothing(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flipping(tensors: dict[str, torch.Tensor], path: Path, metadata: object) -> None:
        next(iter(tensors.values())).view(torch.uint8)[0] ^= 1
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr("anima.model.weights.save_file", flipping)
    with pytest.raises(ModelError, match="changed"):
        prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    monkeypatch.setattr("anima.model.new_folder.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(ModelError, match="not enough room") as caught:
        prequantize(str(tiny_llama_dir), tmp_path / "nf4", FP32)
    assert "GiB free" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".nf4.lock"]


def test_what_cannot_be_converted_is_said_before_work(tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there already"):
        prequantize(str(tiny_llama_dir), tiny_llama_dir, FP32)
    made = tmp_path / "nf4"
    prequantize(str(tiny_llama_dir), made, FP32)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for place, message in (("file/nf4", "cannot be made"), ("link", "a link to")):
        with pytest.raises(ModelError) as caught:
            prequantize(str(tiny_llama_dir), tmp_path / place, FP32)
        assert message in str(caught.value)
    with pytest.raises(ModelError, match="NF4 already"):
        prequantize(str(made), tmp_path / "again", FP32)
    with pytest.raises(ModelError, match="quantised form"):
        load_base(ModelConfig(model_name_or_path=str(made), quantization="none"), FP32)
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantised form"):
        load_base(ModelConfig(model_name_or_path=str(made)), FP32)


def test_a_broken_source_names_the_file_or_the_tensor(tiny_llama_dir: Path, tmp_path: Path) -> None:
    source = saved_as(tmp_path / "source", tiny_llama_dir, torch.float32, shard="100KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match="damaged"):
        open_base(str(source))
    shard.unlink()
    with pytest.raises(ModelError, match="missing or damaged"):
        open_base(str(source))
    shard.write_bytes(whole)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelError, match="shape"):
        open_base(str(source))
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="9 missing"):
        open_base(str(source))
    (source / "config.json").write_text(json.dumps(config))
    for index in ("[]", '{"weight_map": {"a": 1}}', "{"):
        (source / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ModelError, match="index of the weights is damaged"):
            open_base(str(source))
    for path in source.glob("model*"):
        path.unlink()
    with pytest.raises(ModelError, match="safetensors"):
        open_base(str(source))


def test_a_hub_model_comes_with_its_code_and_licence(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"model.safetensors", "tokenizer.json", "modeling_own.py", "LICENSE", "NOTICE.md"}
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str(tiny_llama_dir)

    monkeypatch.setattr("anima.model.weights.snapshot_download", download)
    model_folder("owner/name")
    assert {name for name in names if any(fnmatch(name, pattern) for pattern in asked)} == names
