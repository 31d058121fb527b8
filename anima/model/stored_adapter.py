"""An adapter's matrices from its folder, checked against a base that need not be in memory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anima.errors import ModelError
from anima.model.lora import ADAPTER_FILES, adapter_tensors, check_adapter_files
from anima.model.stored_base import StoredBase

NOT_FOLDED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
"""Entries of adapter_config.json that change what an adapter computes in ways that are not folded here."""
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's matrices by layer: A (r, in), B (out, r), and the factor of their product."""

    folder: Path
    scaling: float
    matrices: Mapping[str, tuple[Tensor, Tensor]]

    def update(self, layer: str, device: torch.device) -> Tensor | None:
        """scaling * B A in fp32, (out, in); None for a layer that the adapter leaves alone."""
        if layer not in self.matrices:
            return None
        a_RI, b_OR = (matrix.to(device, torch.float32) for matrix in self.matrices[layer])
        return (b_OR @ a_RI).mul_(self.scaling)


def read_adapter(folder: Path, base: StoredBase) -> StoredAdapter:
    """An adapter's file, checked against the base's shapes.

    Raises:
        ModelError: files are missing, the adapter is of a kind that is not folded, or of another shape.
    """
    check_adapter_files(folder, str(folder))
    stored = json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    foreign = [name for name in NOT_FOLDED if stored.get(name)]
    if foreign or stored.get("bias", "none") != "none":
        raise ModelError(
            "this kind of adapter cannot be merged here",
            where=folder / ADAPTER_FILES[0],
            got=", ".join(foreign) or f"bias {stored['bias']}",
            allowed="plain LoRA on linear layers",
            fix="PEFT's merge_and_unload can, with the whole model in memory",
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter_tensors(folder).items():
        layer, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(layer, {})[kind] = tensor
    for layer, pair in pairs.items():
        _check_pair(folder, layer, pair, base)
    rank = int(stored["r"])
    scaling = stored["lora_alpha"] / (rank**0.5 if stored.get("use_rslora") else rank)
    return StoredAdapter(folder, scaling, {layer: (pair["lora_A"], pair["lora_B"]) for layer, pair in pairs.items()})


def _check_pair(folder: Path, layer: str, pair: Mapping[str, Tensor], base: StoredBase) -> None:
    where = f"{folder / ADAPTER_FILES[1]}: {layer}"
    if layer not in base.to_quantize or pair.keys() != {"lora_A", "lora_B"}:
        raise ModelError(
            "the adapter belongs to another model: the base has no such layer to adapt",
            where=where,
            got=", ".join(sorted(pair)),
            allowed=f"lora_A and lora_B of layers such as {base.to_quantize[0]}",
            fix="--model_name_or_path with the base that anima.json names",
        )
    expected = base.shapes[f"{layer}.weight"]
    found = (pair["lora_B"].shape[0], pair["lora_A"].shape[1])
    if found != expected or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
        raise ModelError(
            "the adapter belongs to a model of another shape",
            where=where,
            got=f"B {tuple(pair['lora_B'].shape)} A {tuple(pair['lora_A'].shape)}",
            allowed=f"a product of {expected}",
            fix="--model_name_or_path with the base that anima.json names",
        )
