"""The frozen base: loading in NF4 or 16 bit, shard by shard, on this rank's device; random weights; its fingerprint.

No `prepare_model_for_kbit_training`: nothing is up-cast, norms and head stay in the compute format.
"""

import hashlib
from pathlib import Path
from typing import cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.model.attention import IMPLEMENTATION
from anima.model.compute import Compute
from anima.model.kernels import install_kernels
from anima.model.tokenizer import check_model_source, model_location

UNSUPPORTED_SETTINGS = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
"""Config entries of models whose attention or head computes something that our kernels do not."""
FINGERPRINT_LAYERS = 3


def load_base(config: ModelConfig, compute: Compute, *, folder: Path | None = None) -> PreTrainedModel:
    """The base model, frozen, in eval mode, on `compute.device`; read from `folder` where a copy of it lies there.

    transformers reads safetensors through memory maps and quantises tensor by tensor, so that host memory
    stays near one shard.

    Raises:
        ModelError: missing folder, no causal language model of Llama's kind, foreign quantisation.
    """
    settings = load_settings(config)
    if config.random_weights:
        model = _random_base(settings, config.quantization == "nf4", compute)
    else:
        model = _pretrained_base(config, settings, compute, folder)
    install_kernels(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in nf4_layers(model).values():
        module.compute_dtype = compute.dtype
        module.compute_type_is_set = True
        # bitsandbytes would repack the weights in place for CPU inference at the first eval() pass, and the
        # training kernels cannot read that format (0.50.2, nn/modules.py).
        module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    model.eval()
    return model


def load_settings(config: ModelConfig) -> PretrainedConfig:
    """The model's config.json, checked for what we can train.

    Raises:
        ModelError: see `load_base`.
    """
    check_model_source(config.model_name_or_path)
    try:
        settings = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            "the model's config cannot be read",
            where=f"--model_name_or_path {config.model_name_or_path}",
            got=str(error).strip().splitlines()[0],
            fix="check the path, or the network and HF_HUB_OFFLINE for a hub name",
        ) from error
    for name in UNSUPPORTED_SETTINGS:
        if getattr(settings, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"models with {name} are not supported: their logits would be wrong",
                where=f"{config.model_name_or_path}: config.json",
                got=f"{name} = {getattr(settings, name)}",
                allowed="Llama, Qwen2, Qwen3, Mistral, Yi, SmolLM and their kin",
            )
    stored = getattr(settings, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
        if "bitsandbytes" not in str(method).lower() or config.quantization != "nf4":
            raise ModelError(
                "the model is stored in a quantised form that cannot be trained as asked",
                where=f"{config.model_name_or_path}: config.json: quantization_config",
                got=f"{method}, with --quantization {config.quantization}",
                allowed="a 16-bit model, or bitsandbytes NF4 with --quantization nf4",
            )
    return cast(PretrainedConfig, settings)


def _pretrained_base(
    config: ModelConfig, settings: PretrainedConfig, compute: Compute, folder: Path | None
) -> PreTrainedModel:
    already_quantized = getattr(settings, "quantization_config", None) is not None
    quantization = None
    if config.quantization == "nf4" and not already_quantized:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute.dtype,
            bnb_4bit_quant_storage=torch.uint8,  # DeepSpeed casts any floating-point storage and destroys it
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_location(config.model_name_or_path) if folder is None else str(folder),
            dtype=compute.dtype,
            quantization_config=quantization,
            device_map={"": str(compute.device)},
            attn_implementation=IMPLEMENTATION,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            "the model cannot be loaded",
            where=f"--model_name_or_path {config.model_name_or_path}",
            got=str(error).strip().splitlines()[0],
            allowed="a causal language model in safetensors",
        ) from error
    if folder is not None:  # what is saved must name the base, not a copy that goes with the job
        model.name_or_path = model.config._name_or_path = model_location(config.model_name_or_path)
    return cast(PreTrainedModel, model)


def skeleton(settings: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights: its layers and their names, in a second at any size."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, attn_implementation=IMPLEMENTATION)
    return cast(PreTrainedModel, model)


def _random_base(settings: PretrainedConfig, quantize: bool, compute: Compute) -> PreTrainedModel:
    """A model of this shape with random weights, made layer by layer on the device itself."""
    model = skeleton(settings)
    nn.Module.to(model, compute.dtype)
    generator = torch.Generator(compute.device).manual_seed(0)

    def draw(shape: torch.Size) -> torch.Tensor:
        empty = torch.empty(shape, dtype=compute.dtype, device=compute.device)
        return empty.normal_(0, settings.initializer_range, generator=generator)

    for name, module in list(model.named_modules()):
        if quantize and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _quantized_linear(module, draw(module.weight.shape), compute))
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            parent, _, child = name.rpartition(".")
            value = torch.ones_like(parameter, device=compute.device) if "norm" in name else draw(parameter.shape)
            setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    with compute.device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config=settings)
    return model


def _quantized_linear(module: nn.Linear, weight: torch.Tensor, compute: Compute) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=compute.dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    parameter = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8, module=layer
    )
    layer.weight = parameter._quantize(compute.device)
    return layer


def nf4_layers(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    """The 4-bit linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def fingerprint(model: nn.Module) -> str:
    """Hash of a few linear layers as the computation sees them: 4-bit codes and scales together.

    Packed codes alone do not tell: DeepSpeed moves and broadcasts them without their scales
    (`Params4bit.quant_state` is no parameter). First, middle and last layer are dequantised and hashed.
    """
    layers: list[nn.Linear] = list(nf4_layers(model).values())
    if not layers:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    chosen = [layers[i * (len(layers) - 1) // (FINGERPRINT_LAYERS - 1)] for i in range(FINGERPRINT_LAYERS)]
    digest = hashlib.sha256()
    for layer in chosen:
        weight = layer.weight.data
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = dequantize_4bit(weight, cast(bnb.nn.Params4bit, layer.weight).quant_state)
        digest.update(weight.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
