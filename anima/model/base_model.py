"""The frozen base: loading in NF4 or 16 bit, shard by shard, on this rank's device; random weights; its fingerprint.

No `prepare_model_for_kbit_training`: nothing is up-cast, norms and head stay in the compute format.
"""

from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.model.attention import IMPLEMENTATION
from anima.model.compute import Compute
from anima.model.kernels import install_kernels
from anima.model.nf4 import BLOCK_SIZE, fingerprint, nf4_layers, nf4_settings
from anima.model.tokenizer import check_model_source, model_location

__all__ = ["fingerprint", "load_base", "load_settings", "nf4_layers", "skeleton"]

UNSUPPORTED_SETTINGS = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
"""Config entries of models whose attention or head computes something that our kernels do not."""


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
    if compute.device.type == "cpu":
        _check_cpu_kernel(config, model)
    install_kernels(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():  # transformers 5.23 leaves it as it is stored beside NF4, whatever dtype says
            parameter.data = parameter.data.to(compute.dtype)
    for module in nf4_layers(model).values():
        module.compute_dtype = compute.dtype
        # A stored state carries the format it was made in; the computation dequantises into its own.
        cast(bnb.nn.Params4bit, module.weight).quant_state.dtype = compute.dtype
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
        source = model_location(config.model_name_or_path)
        settings = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
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
    _check_stored_form(config, stored_quantization(settings))
    return cast(PretrainedConfig, settings)


def stored_quantization(settings: PretrainedConfig) -> dict[str, Any] | None:
    """`quantization_config` of a config.json; None for a model in 16 or 32 bit."""
    stored = getattr(settings, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else cast(dict[str, Any], stored.to_dict())


def _check_stored_form(config: ModelConfig, stored: dict[str, Any] | None) -> None:
    """A quantised model must be NF4 as we quantise it: other layouts would train, and be something else."""
    if stored is None:
        return
    method = str(stored.get("quant_method")).lower()
    kind = (stored.get("bnb_4bit_quant_type"), stored.get("bnb_4bit_quant_storage", "uint8"))
    is_nf4 = "bitsandbytes" in method and bool(stored.get("load_in_4bit")) and kind == ("nf4", "uint8")
    if not is_nf4 or config.quantization != "nf4":
        described = f"{method}{'' if not stored.get('load_in_4bit') else ' ' + ' in '.join(map(str, kind))}"
        raise ModelError(
            "the model is stored in a quantised form that cannot be used as asked",
            where=f"{config.model_name_or_path}: config.json: quantization_config",
            got=f"{described}, with --quantization {config.quantization}",
            allowed="a 16-bit model, or bitsandbytes NF4 in uint8 (launch/prequantize.py) with --quantization nf4",
        )


def _pretrained_base(
    config: ModelConfig, settings: PretrainedConfig, compute: Compute, folder: Path | None
) -> PreTrainedModel:
    on_the_fly = config.quantization == "nf4" and stored_quantization(settings) is None
    # Left out, not None: None would hide the quantisation that a stored NF4 model names (transformers 5.23).
    asked: Any = {"quantization_config": nf4_settings(compute.dtype)} if on_the_fly else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            model_location(config.model_name_or_path) if folder is None else str(folder),
            dtype=compute.dtype,
            device_map={"": str(compute.device)},
            attn_implementation=IMPLEMENTATION,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **asked,
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


def _check_cpu_kernel(config: ModelConfig, model: PreTrainedModel) -> None:
    """bitsandbytes' own CPU layers (0.50.2) use wrong scales where a row is no whole number of blocks."""
    for name, layer in nf4_layers(model).items():
        if layer.in_features % BLOCK_SIZE:
            raise ModelError(
                "bitsandbytes computes this NF4 layer wrongly on a CPU (its scales slip from row to row)",
                where=f"--model_name_or_path {config.model_name_or_path}: {name}",
                got=f"{layer.in_features} inputs",
                allowed=f"a multiple of {BLOCK_SIZE} on a CPU; any even number on a GPU",
                fix="--quantization none for a rehearsal on this machine, or a GPU",
            )


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
