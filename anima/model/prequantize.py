"""A model in 16 bit to a folder in NF4, tensor by tensor, in the layout that stock transformers loads.

The result holds the same bits as quantising on the fly, under the same fingerprint; proven before the folder appears.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anima.errors import ModelError
from anima.model.compute import Compute
from anima.model.new_folder import check_new, new_folder
from anima.model.nf4 import nf4_settings
from anima.model.stored_base import UNUSED, StoredBase, open_base
from anima.model.tokenizer import model_location
from anima.model.weights import SHARD_BYTES, ShardWriter

RECORD = "anima_nf4.json"
COPIED = (".json", ".jinja", ".model", ".txt", ".py")
"""Endings of the files that belong to a model beside its weights."""


@dataclass(frozen=True)
class Prequantized:
    """What was made, as anima_nf4.json says it."""

    source: str
    fingerprint: str
    dtype: str
    device: str
    source_gib: float
    gib: float
    versions: dict[str, str]


def prequantize(
    source: str,
    output_dir: Path,
    compute: Compute,
    *,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Prequantized:
    """Write the NF4 form of `source` to `output_dir`: all of it, proven, or nothing.

    Args:
        source: Folder or hub name of a model in 16 or 32 bit.
        output_dir: A new or empty folder.
        compute: Device that quantises; its number format is what weights are rounded to before (as in training).
        trust_remote_code: Run Python code that comes with the model.
        shard_bytes: Size of a shard; about twice that is needed in host memory.
        on_tensor: Called with the bytes of the source that are done, and all of them.

    Raises:
        ModelError: no such model, quantised already, a folder in the way, no room, or the result is not what it
            should be.
        OSError: the disk refuses.
    """
    check_new(output_dir)
    base = open_base(source, trust_remote_code=trust_remote_code)
    if base.is_nf4:
        raise ModelError(
            "the model is in NF4 already",
            where=f"--model_name_or_path {source}",
            fix=f"train on it as it is: --model_name_or_path {source}",
        )
    with new_folder(output_dir, need_bytes=_expected_bytes(base)) as folder:
        sums = _write_weights(base, folder, compute, shard_bytes, on_tensor)
        copy_companions(base.folder, folder)
        _write_config(base, folder, compute.dtype)
        written = open_base(str(folder), trust_remote_code=trust_remote_code)
        fingerprint = base.fingerprint(compute.dtype, compute.device, nf4=True)
        _verify(written, sums, fingerprint, compute)
        record = Prequantized(
            source=model_location(source),
            fingerprint=fingerprint,
            dtype=str(compute.dtype).removeprefix("torch."),
            device=compute.device.type,
            source_gib=round(base.weights.nbytes / 2**30, 3),
            gib=round(written.weights.nbytes / 2**30, 3),
            versions={name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        )
        (folder / RECORD).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    return record


def source_of(folder: Path) -> str | None:
    """Where the 16-bit original of an NF4 folder lay; None for another folder."""
    try:
        return str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, template, licence and the model's own code; neither weights nor config.json nor records of ours."""
    for path in sorted(source.iterdir()):
        known = path.suffix in COPIED or path.name.upper().startswith(("LICENSE", "NOTICE"))
        ours = path.name in ("config.json", RECORD, "anima.json") or path.name.endswith(".index.json")
        if path.is_file() and known and not ours:
            shutil.copyfile(path, folder / path.name)


def _write_weights(
    base: StoredBase, folder: Path, compute: Compute, shard_bytes: int, on_tensor: Callable[[int, int], None]
) -> dict[str, int]:
    """All tensors; returns their checksums as they were in memory."""
    writer, sums, done, total = ShardWriter(folder, shard_bytes), {}, 0, base.weights.nbytes
    matrices = {f"{layer}.weight": layer for layer in base.to_quantize}
    for name, stored in base.weights.tensors.items():
        done += stored.nbytes
        if name.endswith(UNUSED) or (base.is_tied and name == "lm_head.weight"):
            continue
        if name in matrices:
            quantized = base.quantized(matrices[name], compute.dtype, compute.device)
            tensors = quantized.stored(name)
        else:
            tensors = {name: _kept(base.weights.read(name), compute.dtype)}
        tensors = {key: value.to("cpu").contiguous() for key, value in tensors.items()}
        sums.update({key: _checksum(value) for key, value in tensors.items()})
        writer.add(tensors)
        on_tensor(done, total)
    writer.finish()
    return sums


def _kept(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What is not quantised: in the computation's format, unless that would only make it longer."""
    return tensor.to(dtype) if dtype.itemsize <= tensor.dtype.itemsize else tensor


def _write_config(base: StoredBase, folder: Path, dtype: torch.dtype) -> None:
    values: dict[str, Any] = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)
    kept = _kept(base.weights.read(base.embedding_name), dtype).dtype
    values["dtype"] = str(kept).removeprefix("torch.")
    values["quantization_config"] = nf4_settings(kept).to_dict()
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _verify(written: StoredBase, sums: dict[str, int], fingerprint: str, compute: Compute) -> None:
    """Read everything back: the bytes are those that were made, and three layers compute what they should."""
    for name, expected in sums.items():
        if name not in written.weights.tensors or _checksum(written.weights.read(name)) != expected:
            raise ModelError("a tensor came back from the disk changed", where=f"{written.folder.name}: {name}")
    found = written.fingerprint(compute.dtype, compute.device, nf4=True)
    if found != fingerprint:
        raise ModelError("the written model is not the one quantised on the fly", got=found, allowed=fingerprint)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _expected_bytes(base: StoredBase) -> int:
    """Size of the result, rounded up: 4.13 bits a quantised weight (Dettmers et al. 2023, section 3), 16 the others."""
    matrices = {f"{layer}.weight" for layer in base.to_quantize}
    total = 0
    for name, stored in base.weights.tensors.items():
        numel = torch.Size(stored.shape).numel()
        total += int(numel * 4.13 / 8) + 8192 if name in matrices else stored.nbytes
    return total + (64 << 20)
