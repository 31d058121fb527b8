"""Logits of every step against a forward pass over the whole text; which models are taken; nothing is left behind."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from recorded_ops import OpRecorder

from anima.config.schema import ModelConfig
from anima.model import decoding
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.decoding import FixedDecoder, cache_length, can_decode
from anima.model.packed import CausalModel, generating

FP32 = Compute(torch.device("cpu"), torch.float32, "test")


def network(folder: Path, quantization: str = "none") -> CausalModel:
    config = ModelConfig(model_name_or_path=str(folder), quantization=quantization)  # type: ignore[arg-type]
    return load_base(config, FP32)


def test_cache_lengths() -> None:
    assert [cache_length(tokens) for tokens in (1, 63, 64, 65, 640)] == [64, 64, 64, 128, 640]


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_logits_are_those_of_the_whole_text(tiny_llama_dir: Path, quantization: str) -> None:
    model = network(tiny_llama_dir, quantization)
    texts = torch.randint(5, 261, (3, 30), generator=torch.Generator().manual_seed(0))
    padding, prompt = (0, 7, 3), 18
    mask = torch.ones(3, prompt, dtype=torch.long)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    recorder = OpRecorder()
    with generating(model), torch.no_grad():
        assert can_decode(model, 3, 64)
        decoder = FixedDecoder(model, texts[:, :prompt], mask, positions, length=64, recorder=recorder)
        found = [decoder.prompt().clone()]
        found += [decoder.next(texts[:, index]).clone() for index in range(prompt, 30)]
        decoder.close()
        for row, count in enumerate(padding):
            whole = model(texts[row : row + 1, count:], use_cache=False).logits[0, prompt - count - 1 :]
            torch.testing.assert_close(torch.stack(found)[:, row], whole, rtol=1e-4, atol=1e-4)
    assert len(recorder.recordings) == 1
    assert not recorder.refusals


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral"])
def test_other_architectures_are_recorded_too(tmp_path: Path, kind: str) -> None:
    options = {"sliding_window": None} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=288,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
        **options,
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    model, recorder = network(tmp_path), OpRecorder()
    texts = torch.randint(5, 261, (2, 20), generator=torch.Generator().manual_seed(0))
    with generating(model), torch.no_grad():
        assert can_decode(model, 2, 64)
        decoder = FixedDecoder(model, texts[:, :9], None, torch.arange(9)[None], length=64, recorder=recorder)
        found = [decoder.prompt().clone()]
        found += [decoder.next(texts[:, index]).clone() for index in range(9, 20)]
        decoder.close()
        whole = model(texts, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(torch.stack(found, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert len(recorder.recordings) == 1
    assert not recorder.refusals


class BreaksWithin(OpRecorder):
    """Refuses when a layer has already written to the cache."""

    def prove(self, step: object) -> torch.Tensor:
        self.model.get_decoder().layers[1].register_forward_pre_hook(self.stop)  # type: ignore[attr-defined]
        return super().prove(step)  # type: ignore[arg-type]

    def stop(self, *_: object) -> None:
        if not self.refusals:
            raise RuntimeError("the host would wait")


def test_a_step_that_broke_off_within_is_done_again(tiny_llama_dir: Path) -> None:
    texts, logits = torch.arange(5, 25)[None], {}
    for recorder in (OpRecorder(), BreaksWithin()):
        model = recorder.model = network(tiny_llama_dir)  # type: ignore[union-attr]
        with generating(model), torch.no_grad():
            decoder = FixedDecoder(model, texts[:, :9], None, torch.arange(9)[None], length=64, recorder=recorder)
            decoder.prompt()
            logits[type(recorder)] = torch.stack([decoder.next(texts[:, index]).clone() for index in range(9, 20)])
            decoder.close()
        assert len(recorder.refusals) == isinstance(recorder, BreaksWithin)
    assert torch.equal(*logits.values())


def test_models_that_are_left_to_the_growing_cache(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = network(tiny_llama_dir)
    assert not can_decode(model, 1, 64)  # packed attention
    with generating(model):
        assert can_decode(model, 1, 64)
        model.config.sliding_window, model.config.layer_types = 32, ["sliding_attention"] * 2
        assert not can_decode(model, 1, 64)
        model.config.layer_types = ["full_attention"] * 2
        assert can_decode(model, 1, 64)
        # 2 layers x 2 x 2 heads x 16 x 4 bytes: 512 bytes a token, and half of the memory may be taken
        monkeypatch.setattr(decoding, "_free_bytes", lambda device: 2 * 512 * 3 * 64)
        assert can_decode(model, 3, 64)
        assert not caplog.messages
        decoding._say_slow.cache_clear()
        assert not can_decode(model, 4, 64)
        assert not can_decode(model, 4, 64)
        assert [message.split(":")[0] for message in caplog.messages] == [
            "answers to 4 prompts at a time come more slowly"
        ]
        model.get_decoder().layers[0].self_attn = torch.nn.Identity()
        assert not can_decode(model, 1, 64)


def test_the_cache_is_free_at_once(tiny_llama_dir: Path) -> None:
    model = network(tiny_llama_dir)
    prompt, positions = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    gc.disable()
    try:
        with generating(model), torch.no_grad():
            decoder = FixedDecoder(model, prompt, None, positions, length=64, recorder=OpRecorder())
            logits = decoder.prompt()
            for _ in range(4):
                logits = decoder.next(logits.argmax(-1))
            cache = weakref.ref(decoder._cache)
            decoder.close()
            del decoder, logits
        assert cache() is None
    finally:
        gc.enable()
