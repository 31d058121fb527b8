"""The trained part: LoRA adapters through PEFT, which keeps owning their parameters and their file format."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import peft
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from anima.config.paths import expanded
from anima.config.schema import LoraConfig
from anima.errors import ModelError
from anima.model.fp8 import enable_fp8, uses_fp8
from anima.model.fused_layer import fuse_sums
from anima.model.kernels import fused_layers, hand_rows_on
from anima.model.lora_layers import FusedLora4bit, FusedLora16bit, FusedLoraLayer

AdaptedModel = PeftModel
"""A transformers model with LoRA layers in place, as PEFT wraps it."""

REFERENCE = "reference"
"""PEFT's name of a second, frozen adapter while it stands in for the first."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def peft_config(config: LoraConfig, targets: list[str]) -> peft.LoraConfig:
    """PEFT's form of our options, with our fused layers in place of its own."""
    translated = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=cast(int, config.lora_alpha),
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    use_fused_layers(translated)
    return translated


def use_fused_layers(config: peft.PeftConfig) -> None:
    """Let PEFT build our layers (its documented way to bring one's own: developer guide "custom models")."""
    cast(peft.LoraConfig, config)._register_custom_module({Linear4bit: FusedLora4bit, nn.Linear: FusedLora16bit})


def attach_lora(
    model: PreTrainedModel, config: LoraConfig, *, dtype: torch.dtype, seed: int, adapter_path: str | None = None
) -> PeftModel:
    """Put trainable LoRA matrices beside the linear layers of a frozen base.

    A new adapter starts as zero (B = 0, Hu et al. 2021, section 4.1), its A drawn under `seed`.

    Args:
        model: The frozen base.
        config: Rank, scale, dropout and targets; an adapter that is loaded must agree with them.
        dtype: Number format of the matrices (their fp32 masters belong to the optimizer).
        seed: Seed of the start values.
        adapter_path: Folder of an adapter to go on from.

    Raises:
        ModelError: no layer has a target's name; the adapter's folder is missing or of another shape.
    """
    targets = resolve_targets(model, config.lora_target_modules)
    if adapter_path is not None:
        check_adapter(config, adapter_path)
        folder = str(expanded(adapter_path))
        stored = peft.PeftConfig.from_pretrained(folder)
        stored.inference_mode = False
        use_fused_layers(stored)
        adapted = PeftModel.from_pretrained(
            model, folder, config=stored, is_trainable=True, autocast_adapter_dtype=False
        )
    else:
        torch.manual_seed(seed)
        adapted = get_peft_model(model, peft_config(config, targets), autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
            parameter.grad_dtype = torch.float32  # gradients of micro-batches add up without rounding
    return adapted


def compute_in_fp8(model: PeftModel, *, forward: bool = True) -> list[str]:
    """Let the base under every LoRA layer compute in fp8.

    Args:
        model: A base with its adapter.
        forward: False for the products of input gradients alone.

    Returns:
        Names of the layers that stay in bf16.

    Raises:
        ModelError: the base is not NF4, or the kernels compute something else on this GPU.
    """
    groups = [[layer.base for layer in group] for group in fused_layers(model)]
    left = enable_fp8(model, groups, forward=forward)
    hand_rows_on(model)
    fuse_sums(model)
    return left


def layers_outside_fp8(model: PeftModel) -> list[str]:
    """Names of the layers under LoRA that do not compute in fp8."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(layer.base)] for layer in _fused_layers(model) if not uses_fp8(layer.base)]


def _fused_layers(model: PeftModel) -> list[FusedLoraLayer]:
    return [module for module in model.modules() if isinstance(module, FusedLoraLayer)]


def resolve_targets(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Last name parts of the linear layers to adapt; the output head is never one of them.

    Raises:
        ModelError: a name matches no linear layer.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)
        and module is not head
    }  # fmt: skip
    if names == ("all-linear",):
        return sorted(found)
    unknown = sorted(set(names) - found)
    if unknown:
        raise ModelError(
            f"no linear layer is called {' or '.join(unknown)}",
            where="--lora_target_modules",
            got=" ".join(names),
            allowed="all-linear, or some of " + " ".join(sorted(found)),
        )
    return sorted(names)


def check_adapter(config: LoraConfig, adapter_path: str) -> None:
    """Find out whether training can go on from an adapter, before the base is loaded.

    Raises:
        ModelError: files are missing, or rank or scale differ from the config's.
    """
    folder = expanded(adapter_path)
    check_adapter_files(folder, f"--adapter_path {adapter_path}")
    stored = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    for key, value in (("r", config.lora_r), ("lora_alpha", config.lora_alpha)):
        if stored.get(key) != value:
            raise ModelError(
                f"the adapter was trained with another {key}",
                where=f"--adapter_path {adapter_path}: {ADAPTER_FILES[0]}",
                got=f"{key} = {stored.get(key)}, but the config says {value}",
                fix=f"--lora_{key.removeprefix('lora_')} {stored.get(key)}",
            )


def check_adapter_files(folder: Path, where: str) -> None:
    """Refuse a folder without PEFT's two files, whole and of a LoRA adapter, with a ModelError."""
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"the adapter's folder lacks {' and '.join(missing)}",
            where=where,
            allowed="a folder that PEFT's save_pretrained wrote (safetensors)",
            fix="point to the adapter/ folder of an earlier run",
        )
    try:
        stored = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        described = (stored["peft_type"], type(stored["r"]), isinstance(stored["lora_alpha"], int | float))
        with safe_open(folder / ADAPTER_FILES[1], framework="pt"):
            pass  # its header tells how long the file has to be
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _damaged(where, f"{type(error).__name__}: {error}") from error
    if described != ("LORA", int, True):
        raise _damaged(where, f"{ADAPTER_FILES[0]} of an adapter of another kind")


def _damaged(where: str, got: str) -> ModelError:
    return ModelError(
        "the adapter's files are damaged, or not those of a LoRA adapter",
        where=where,
        got=got,
        allowed=" and ".join(ADAPTER_FILES) + ", as PEFT's save_pretrained wrote them",
        fix="copy the folder again, or take another checkpoint of its run",
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora_b_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that start at zero and must move: the second matrix of every pair."""
    return {name: p for name, p in trainable_parameters(model).items() if ".lora_B." in name}


def adapter_on_host(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter in host memory, by name: `save_adapter` can write it while training goes on."""
    return {name: p.detach().to("cpu", copy=True) for name, p in trainable_parameters(model).items()}


def save_adapter(model: PeftModel, folder: Path, tensors: dict[str, Tensor] | None = None) -> None:
    """Write the adapter in PEFT's own format and read it back.

    Args:
        model: The adapted model.
        folder: Where to.
        tensors: What `adapter_on_host` gave; None: the parameters as they are now.

    Raises:
        ModelError: the written file lacks a tensor or holds another shape (an adapter saved empty is a
            classic of sharded training).
        OSError: the disk refuses.
    """
    try:
        model.save_pretrained(str(folder), safe_serialization=True, state_dict=tensors)
    except SafetensorError as error:
        raise OSError(f"{ADAPTER_FILES[1]}: {error}") from error
    written = load_file(folder / ADAPTER_FILES[1])
    expected = {name.replace(".default.", "."): p for name, p in trainable_parameters(model).items()}
    if {k: v.shape for k, v in written.items()} != {k: v.shape for k, v in expected.items()}:
        raise ModelError(
            "the adapter's file does not hold what was trained",
            where=folder / ADAPTER_FILES[1],
            got=f"{len(written)} tensors",
            allowed=f"{len(expected)} tensors",
        )


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter by PEFT's names."""
    return load_file(folder / ADAPTER_FILES[1])


def adapter_hash(folder: str) -> str:
    """Hash of a saved adapter's tensors and of the scale they are used with.

    Raises:
        ModelError: files are missing.
    """
    path = expanded(folder)
    check_adapter_files(path, folder)
    stored = json.loads((path / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    digest = hashlib.sha256(repr((stored.get("r"), stored.get("lora_alpha"), stored.get("use_rslora"))).encode())
    for name, tensor in sorted(adapter_tensors(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """The base alone; the adapter is back afterwards. Call it before the optimizer is built: PEFT switches gradients
    off and on again for this.
    """
    with model.disable_adapter():
        yield


@contextmanager
def with_other_adapter(model: PeftModel, folder: str) -> Iterator[None]:
    """Another adapter, frozen, in place of the trained one, which is back afterwards; the other one is let go.

    Raises:
        ModelError: files are missing, or its matrices do not fit the model.
    """
    path = expanded(folder)
    check_adapter_files(path, folder)
    trained = model.active_adapter
    dtype = next(iter(trainable_parameters(model).values())).dtype
    try:
        model.load_adapter(str(path), adapter_name=REFERENCE, is_trainable=False, autocast_adapter_dtype=False)
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            "the reference's adapter does not fit the model",
            where=folder,
            got=str(error).strip().splitlines()[0],
            fix="use an adapter of this base",
        ) from error
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.data = parameter.data.to(dtype)
    try:
        model.set_adapter(REFERENCE, inference_mode=True)
        yield
    finally:
        model.set_adapter(trained)
        model.delete_adapter(REFERENCE)
