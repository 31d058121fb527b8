"""The base's matrices read from its folder one by one, as the computation would see them after `load_base`.

For work on models that need not fit into memory: merging, fingerprints, verification.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anima.config.schema import ModelConfig
from anima.errors import ModelError
from anima.model.base_model import load_settings, skeleton, stored_quantization
from anima.model.nf4 import (
    Quantized,
    fingerprint_choice,
    fingerprint_of,
    from_stored,
    layers_to_quantize,
    quantize,
    stored_parts,
)
from anima.model.weights import StoredWeights, model_folder

UNUSED = ("rotary_emb.inv_freq",)
"""Endings of tensors that old folders carry and that no model reads any more."""


@dataclass(frozen=True)
class StoredBase:
    """A model folder, its shape, and what of it is quantised.

    Attributes:
        folder: Where it lies.
        settings: Its config.json.
        weights: Its tensors.
        shapes: Its parameters' shapes by name, in the model's order, as a model in 16 bit has them.
        linear: Names of all linear layers, in the model's order.
        to_quantize: Those that NF4 applies to.
        is_nf4: Whether they are stored in NF4 already.
        is_tied: Whether the output head is the embedding table.
    """

    folder: Path
    settings: PretrainedConfig
    weights: StoredWeights
    shapes: dict[str, tuple[int, ...]]
    linear: tuple[str, ...]
    to_quantize: tuple[str, ...]
    is_nf4: bool
    is_tied: bool

    def quantized(self, layer: str, dtype: torch.dtype, device: torch.device) -> Quantized:
        """A linear layer's matrix in NF4, read or made.

        Args:
            layer: Its name.
            dtype: Number format that `load_base` would have cast the weight to before quantising.
            device: Where to quantise.
        """
        name = f"{layer}.weight"
        if self.is_nf4:
            parts = {part: self.weights.read(part) for part in stored_parts(name)}
            return from_stored(name, parts, device)
        return quantize(self.weights.read(name).to(device, dtype))

    def dense(self, layer: str, dtype: torch.dtype, device: torch.device, *, nf4: bool) -> Tensor:
        """A linear layer's matrix as a model computes with it, (out, in): through NF4 or as it is stored."""
        if nf4 and layer in self.to_quantize:
            return self.quantized(layer, dtype, device).dense(dtype)
        name = f"{layer}.weight"
        if name not in self.weights.tensors:  # the output head, tied to the embeddings
            name = self.embedding_name
        return self.weights.read(name).to(device, dtype)

    def fingerprint(self, dtype: torch.dtype, device: torch.device, *, nf4: bool) -> str:
        """What `fingerprint` says of the loaded model, from three of its layers."""
        chosen = fingerprint_choice(self.to_quantize if nf4 else self.linear)
        return fingerprint_of(self.dense(layer, dtype, device, nf4=nf4) for layer in chosen)

    def matrix_bytes(self, layer: str) -> int:
        """What a linear layer's matrix takes in the files."""
        parts = stored_parts(f"{layer}.weight") if self.is_nf4 else [f"{layer}.weight"]
        return sum(self.weights.tensors[part].nbytes for part in parts)

    @property
    def embedding_name(self) -> str:
        """Name of the embedding table's tensor."""
        return next(name for name in self.weights.tensors if name.endswith("embed_tokens.weight"))


def open_base(name_or_path: str, *, trust_remote_code: bool = False) -> StoredBase:
    """A model's folder, with every tensor accounted for.

    Raises:
        ModelError: no such model, a kind that we cannot use, files missing, or tensors that do not fit its config.
    """
    folder = model_folder(name_or_path)
    config = ModelConfig(model_name_or_path=str(folder), trust_remote_code=trust_remote_code)
    settings = load_settings(config)
    model = skeleton(settings)
    linear = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    is_tied = bool(settings.tie_word_embeddings)
    base = StoredBase(
        folder=folder,
        settings=settings,
        weights=StoredWeights(folder),
        shapes=shapes,
        linear=linear,
        to_quantize=tuple(layers_to_quantize(model)),
        is_nf4=stored_quantization(settings) is not None,
        is_tied=is_tied,
    )
    _check_tensors(base)
    return base


def _check_tensors(base: StoredBase) -> None:
    """Every parameter of the model is there in its shape, and nothing else is."""
    shapes = base.shapes
    packed = {f"{layer}.weight" for layer in base.to_quantize} if base.is_nf4 else set()
    expected = {part for name in packed for part in stored_parts(name)} | shapes.keys()
    found = {name for name in base.weights.tensors if not name.endswith(UNUSED)}
    head = {"lm_head.weight"} if base.is_tied else set()  # stored or not, it is the embedding table
    missing, foreign = sorted(expected - found - head), sorted(found - expected - head)
    if missing or foreign:
        raise ModelError(
            "the tensors of the folder are not those of its config",
            where=base.folder,
            got="; ".join(
                f"{len(names)} {word}, such as {names[0]}"
                for word, names in (("missing", missing), ("unknown", foreign))
                if names
            ),
            fix="copy the folder again; a model of another library's layout: load and save it with transformers first",
        )
    for name in sorted(found & shapes.keys() - packed):
        if base.weights.tensors[name].shape != shapes[name]:
            raise ModelError(
                "a tensor's shape is not that of the config",
                where=f"{base.weights.tensors[name].file}: {name}",
                got=base.weights.tensors[name].shape,
                allowed=shapes[name],
            )


def materialise(model: PreTrainedModel, base: StoredBase, dtype: torch.dtype, device: torch.device) -> None:
    """Give a skeleton everything but its quantisable matrices: embeddings, norms, biases, head, rotary tables."""
    skipped = {f"{layer}.weight" for layer in base.to_quantize}
    for name, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta" and name not in skipped and name in base.weights.tensors:
            parent, _, child = name.rpartition(".")
            value = base.weights.read(name).to(device, dtype)
            setattr(model.get_submodule(parent), child, nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    decoder = model.get_decoder()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config=base.settings)
