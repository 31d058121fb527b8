"""The base, the adapter and the packed network on a tiny Llama: what goes in, what comes out, what is saved."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from anima.config.schema import LoraConfig, ModelConfig
from anima.errors import ModelError
from anima.model.base_model import fingerprint, load_base, load_settings, nf4_layers
from anima.model.compute import Compute
from anima.model.lora import attach_lora, lora_b_parameters, save_adapter, trainable_parameters
from anima.model.packed import PackedModel, generating
from anima.model.tokenizer import load_tokenizer

FP32 = Compute(torch.device("cpu"), torch.float32, "test")
LORA = LoraConfig(lora_r=4, lora_alpha=8)


def build(folder: Path, *, recompute: str = "none", **model: object) -> PackedModel:
    base = load_base(ModelConfig(model_name_or_path=str(folder), **model), FP32)  # type: ignore[arg-type]
    return PackedModel(attach_lora(base, LORA, dtype=torch.float32, seed=3), recompute)


def forward(network: PackedModel, documents: list[list[int]]) -> torch.Tensor:
    lengths = tuple(len(document) for document in documents)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    row = torch.tensor([[token for document in documents for token in document]])
    return network(row, positions, boundaries, lengths)


def shake(network: PackedModel) -> None:
    """Give every B a value, as after training."""
    generator = torch.Generator().manual_seed(5)
    for parameter in lora_b_parameters(network).values():
        parameter.data.normal_(0, 0.05, generator=generator)


def test_packed_documents_are_computed_as_if_alone(tiny_llama_dir: Path) -> None:
    network = build(tiny_llama_dir)
    shake(network)
    documents = [[5, 6, 7, 8, 9], [200, 3], [40] * 7]
    together = forward(network, documents)
    alone = torch.cat([forward(network, [document]) for document in documents])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    # ... and a change in one document does not reach the others.
    changed = forward(network, [[9, 9, 9, 9, 9], [200, 3], [40] * 7])
    assert torch.equal(changed[5:], together[5:])
    assert not torch.allclose(changed[:5], together[:5])


def test_hidden_states_equal_stock_transformers(tiny_llama_dir: Path) -> None:
    network = build(tiny_llama_dir, quantization="none")
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    document = [10, 20, 30, 40, 50]
    logits = forward(network, [document]) @ network.head_weight.T
    expected = stock(torch.tensor([document])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_recomputation_changes_no_gradient(tiny_llama_dir: Path) -> None:
    gradients = []
    for recompute in ("none", "all"):
        network = build(tiny_llama_dir, recompute=recompute)
        shake(network)
        network.train()
        forward(network, [[5, 6, 7], [8, 9]]).square().sum().backward()
        gradients.append([p.grad.clone() for p in trainable_parameters(network).values() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == 28
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=1e-5, atol=1e-6)


def test_every_linear_layer_but_the_head_is_nf4_with_uint8_storage(tiny_llama_dir: Path) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), FP32)
    layers = nf4_layers(base)
    assert len(layers) == 14
    assert {layer.weight.dtype for layer in layers.values()} == {torch.uint8}
    assert {layer.weight.quant_type for layer in layers.values()} == {"nf4"}
    assert all(layer.weight.quant_state.nested for layer in layers.values())
    assert base.get_output_embeddings().weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_an_eval_pass_leaves_the_4_bit_weights_alone(tiny_llama_dir: Path) -> None:
    """On CPUs with AVX-512 BF16 bitsandbytes would repack them for inference and training would run on garbage."""
    network = build(tiny_llama_dir)
    before = fingerprint(network)
    network.eval()
    with torch.no_grad():
        first = forward(network, [[5, 6, 7]])
    assert fingerprint(network) == before
    network.train()
    torch.testing.assert_close(forward(network, [[5, 6, 7]]), first)


def test_the_fingerprint_sees_codes_and_scales(tiny_llama_dir: Path) -> None:
    network = build(tiny_llama_dir)
    before = fingerprint(network)
    layer = next(iter(nf4_layers(network).values()))
    layer.weight.quant_state.absmax[0] += 1
    assert fingerprint(network) != before
    layer.weight.quant_state.absmax[0] -= 1
    assert fingerprint(network) == before
    layer.weight.data[0] ^= 1
    assert fingerprint(network) != before


def test_random_weights_need_no_file_and_are_the_same_every_time(tiny_llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    prints = {fingerprint(build(tmp_path, random_weights=True)) for _ in range(2)}
    assert len(prints) == 1
    network = build(tmp_path, random_weights=True)
    assert len(nf4_layers(network)) == 14
    assert torch.isfinite(forward(network, [[5, 6, 7]])).all()


def test_plain_transformers_and_peft_load_the_saved_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    network = build(tiny_llama_dir, quantization="none")
    shake(network)
    save_adapter(network.adapted, tmp_path / "adapter")
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    plain = PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    document = [10, 20, 30, 40, 50]
    with torch.no_grad():
        ours = forward(network, [document]) @ network.head_weight.T
        torch.testing.assert_close(plain(torch.tensor([document])).logits[0], ours, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(stock.base_model(torch.tensor([document])).last_hidden_state, ours[..., :64])


def test_training_goes_on_from_a_saved_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    network = build(tiny_llama_dir)
    shake(network)
    save_adapter(network.adapted, tmp_path / "adapter")
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), FP32)
    again = attach_lora(base, LORA, dtype=torch.float32, seed=9, adapter_path=str(tmp_path / "adapter"))
    for one, other in zip(
        trainable_parameters(network.adapted).values(), trainable_parameters(again).values(), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(ModelError, match="another r"):
        attach_lora(base, LoraConfig(lora_r=8), dtype=torch.float32, seed=9, adapter_path=str(tmp_path / "adapter"))


def test_the_seed_decides_the_start(tiny_llama_dir: Path) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), FP32)
        return list(trainable_parameters(attach_lora(base, LORA, dtype=torch.float32, seed=seed)).values())

    first, same, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_generation_on_the_training_network_equals_stock(tiny_llama_dir: Path) -> None:
    network = build(tiny_llama_dir, quantization="none", recompute="all")
    network.train()
    stock = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    prompt = torch.tensor([[10, 20, 30]])
    with generating(network.causal_lm):
        ours = network.causal_lm.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, stock.generate(prompt, max_new_tokens=8, do_sample=False))
    assert network.causal_lm.training
    forward(network, [[5, 6, 7]])  # and packed training works again


def test_wrong_targets_name_the_right_ones(tiny_llama_dir: Path) -> None:
    base = load_base(ModelConfig(model_name_or_path=str(tiny_llama_dir)), FP32)
    with pytest.raises(ModelError, match="query_key_value") as caught:
        attach_lora(base, LoraConfig(lora_target_modules=("query_key_value",)), dtype=torch.float32, seed=0)
    assert "q_proj" in str(caught.value)
    with pytest.raises(ModelError, match="lm_head"):
        attach_lora(base, LoraConfig(lora_target_modules=("lm_head",)), dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/at/all", "no such model folder"),
        ("./missing", "no such model folder"),
        ("~nobody-of-this-name/model", "no such model folder"),
        ("EMPTY", "holds no model"),
    ],
)
def test_a_wrong_model_path_is_said_at_once(tmp_path: Path, name: str, message: str) -> None:
    path = str(tmp_path) if name == "EMPTY" else name
    with pytest.raises(ModelError, match=message):
        load_tokenizer(ModelConfig(model_name_or_path=path))


def test_a_model_in_the_home_folder_is_found(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_llama_dir.parent))
    config = ModelConfig(model_name_or_path=f"~/{tiny_llama_dir.name}")
    assert load_tokenizer(config).eos_token is not None
    assert load_settings(config).model_type == "llama"


def test_a_model_whose_logits_we_would_get_wrong_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    settings = json.loads((tiny_llama_dir / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        load_base(ModelConfig(model_name_or_path=str(tmp_path)), FP32)


def test_a_tokenizer_without_end_of_sequence_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    with pytest.raises(ModelError, match="end-of-sequence"):
        load_tokenizer(ModelConfig(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("policy", ["cheap", "1", "all"])
def test_every_recompute_policy_gives_the_same_gradients_and_keeps_less(tiny_llama_dir: Path, policy: str) -> None:
    def kept_and_gradients(recompute: str) -> tuple[int, list[torch.Tensor]]:
        network = build(tiny_llama_dir, recompute=recompute)
        shake(network)
        network.train()
        storages: dict[int, int] = {}
        frozen = {p.untyped_storage().data_ptr() for p in network.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(network, [[5] * 300, [8] * 200])
        output.square().sum().backward()
        gradients = [p.grad.clone() for p in trainable_parameters(network).values() if p.grad is not None]
        return sum(storages.values()), gradients

    most, reference = kept_and_gradients("none")
    less, gradients = kept_and_gradients(policy)
    assert less < 0.93 * most
    for one, other in zip(reference, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_our_norm_and_swiglu_stand_in_for_transformers_own(tiny_llama_dir: Path) -> None:
    network = build(tiny_llama_dir)
    kinds = [type(module).__name__ for module in network.modules()]
    assert kinds.count("RmsNorm") == 5
    assert kinds.count("SwiGlu") == 2
    assert not any(kind in ("LlamaMLP", "LlamaRMSNorm") for kind in kinds)
