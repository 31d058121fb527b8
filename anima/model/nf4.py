"""One matrix in NF4: made, read back as the computation sees it, and in the form that bitsandbytes stores.

Owns the settings of the quantisation, so that a base is the same bits whether it was quantised on the fly or before.
"""

import copy
import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from anima.free_memory import free_host_memory

T = TypeVar("T")
_log = logging.getLogger(__name__)

BLOCK_SIZE = 64
"""Weights that share a scale (Dettmers et al. 2023, section 3)."""
FINGERPRINT_LAYERS = 3
DENSE_SHARE = 0.5
"""Of the free memory, at most, for dequantised matrices."""
WORD = 8
"""Weights that our kernel reads at a time."""
_BLOB = "quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", _BLOB)
"""What lies beside a packed matrix in a file, each under `NAME.PART`."""


@dataclass(frozen=True)
class Quantized:
    """A matrix in NF4: two codes a byte, (numel / 2, 1), and the scales in their own quantised form."""

    packed: Tensor
    state: QuantState

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that training computes with, (out, in), dequantised in `dtype` itself."""
        self.state.dtype = dtype
        return dequantize(self.packed, self.state)

    def stored(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file, by name: bitsandbytes' own layout, which stock transformers loads."""
        parts = self.state.as_dict(packed=True)
        return {name: self.packed, **{f"{name}.{key}": value for key, value in parts.items()}}


def quantize(weight: Tensor) -> Quantized:
    """NF4 with double quantisation, as `load_base` does it on the fly. bf16 and the same values in fp32 give the same
    bits; another device may not, because sums are taken in another order.

    Args:
        weight: (out, in), on the device that quantises.
    """
    packed, state = quantize_4bit(
        weight.contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
    )
    return Quantized(packed, state)


def dequantize(packed: Tensor, state: QuantState) -> Tensor:
    """A packed matrix as the computation sees it, (out, in) in `state.dtype`: the same bits from our kernel on a GPU
    and from bitsandbytes.

    bitsandbytes' CPU kernel (0.50.2) begins a block of scales at every row, though blocks run on over rows: it is wrong
    where a row is no whole number of blocks. As one long row the same kernel is right.
    """
    if not rows_are_whole_blocks(state) and packed.device.type == "cpu":
        flat = copy.copy(state)
        flat.shape = torch.Size((state.shape.numel(),))
        return dequantize_4bit(packed, flat).view(state.shape)
    if packed.is_cuda and state.dtype == torch.bfloat16 and kernel_reads(state) and _kernel_agrees(packed, state):
        return unpack(packed, state, torch.bfloat16)
    return dequantize_4bit(packed, state)


def unpack(
    packed: Tensor,
    state: QuantState,
    dtype: torch.dtype,
    *,
    inverse_scale: Tensor | None = None,
    transposed: bool = False,
    output: Tensor | None = None,
) -> Tensor:
    """The matrix in one pass of our kernel; arguments as in `nf4_kernels.unpack`."""
    from anima.model import nf4_kernels

    return nf4_kernels.unpack(
        packed,
        state.absmax,
        (state.state2.code, state.state2.absmax, state.offset) if state.nested else None,
        state.code,
        (state.shape[0], state.shape[1]),
        dtype,
        blocksize=state.blocksize,
        groupsize=state.state2.blocksize if state.nested else 1,
        inverse_scale=inverse_scale,
        transposed=transposed,
        output=output,
    )


def kernel_reads(state: QuantState) -> bool:
    """Whether our kernel can read a matrix of this shape."""
    return bool(len(state.shape) == 2 and state.shape[1] % WORD == 0)


_agrees: list[bool] = []


def _kernel_agrees(packed: Tensor, state: QuantState) -> bool:
    """Once a process: whether our kernel gives bitsandbytes' bits on this GPU, on a matrix of this run."""
    if not _agrees:
        _agrees.append(torch.equal(unpack(packed, state, torch.bfloat16), dequantize_4bit(packed, state)))
        if not _agrees[0]:
            _log.warning("our NF4 kernel differs from bitsandbytes on this GPU: using bitsandbytes, which is slower")
    return _agrees[0]


def rows_are_whole_blocks(state: QuantState) -> bool:
    """Whether every row of the matrix begins a block."""
    return bool(state.shape[-1] % state.blocksize == 0)


def stored_parts(name: str) -> list[str]:
    """Names of all tensors of a stored matrix."""
    return [name, *(f"{name}.{part}" for part in PARTS)]


def from_stored(name: str, tensors: Mapping[str, Tensor], device: torch.device) -> Quantized:
    """A matrix from the tensors of a file."""
    parts = {part: tensors[f"{name}.{part}"] for part in PARTS}
    return Quantized(tensors[name].to(device), QuantState.from_dict(dict(parts), device=device))


def nf4_settings(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The quantisation in transformers' words."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=torch.uint8,  # DeepSpeed casts any floating-point storage and destroys it
    )


def nf4_layers(model: nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    """The 4-bit linear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def layers_to_quantize(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that transformers would quantise, in the model's order; `model` (a skeleton) changes.

    Its own rule: all but the output head and what is tied to the embeddings.
    """
    quantizer = AutoHfQuantizer.from_config(nf4_settings(torch.bfloat16), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    return list(nf4_layers(model))


def hold_dense(model: PreTrainedModel) -> bool:
    """For inference on a CPU: keep the dequantised matrices instead of making them anew for every token.

    The values are the same, so are the answers; it takes 2 or 4 bytes a weight, and is many times faster.

    Returns:
        False where memory does not suffice; then nothing has changed.
    """
    layers = nf4_layers(model)
    need = sum(layer.in_features * layer.out_features for layer in layers.values()) * model.dtype.itemsize
    if need > DENSE_SHARE * free_host_memory().size:
        return False
    for name, layer in layers.items():
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(_dense(layer), requires_grad=False)
        if layer.bias is not None:
            dense.bias = layer.bias
        model.set_submodule(name, dense)
    return True


def fingerprint(model: nn.Module) -> str:
    """Hash of a few linear layers as the computation sees them: 4-bit codes and scales together.

    Packed codes alone do not tell: DeepSpeed moves and broadcasts them without their scales
    (`Params4bit.quant_state` is no parameter). First, middle and last layer are dequantised and hashed.
    """
    layers: list[nn.Linear] = list(nf4_layers(model).values())
    if not layers:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    chosen = fingerprint_choice(layers)
    return fingerprint_of(_dense(layer) for layer in chosen)


def fingerprint_choice(layers: Sequence[T]) -> list[T]:
    """First, middle and last of the layers (or of their names)."""
    return [layers[i * (len(layers) - 1) // (FINGERPRINT_LAYERS - 1)] for i in range(FINGERPRINT_LAYERS)]


def fingerprint_of(weights: Iterable[Tensor]) -> str:
    """Hash of matrices as the computation sees them."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _dense(layer: nn.Linear) -> Tensor:
    weight = layer.weight.data
    if isinstance(layer, bnb.nn.Linear4bit):
        weight = dequantize(weight, cast(bnb.nn.Params4bit, layer.weight).quant_state)
    return weight
