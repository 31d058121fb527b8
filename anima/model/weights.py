"""Tensors of a stored model one at a time, and a writer that never holds more than a shard.

Knows safetensors and where a hub name lies on the disk; not what the tensors mean.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from anima.config.paths import expanded
from anima.errors import ModelError
from anima.model.tokenizer import check_model_source

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**31
"""Size of a written shard, and so of what a writer keeps in host memory."""
_DOWNLOADED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*")
"""Weights, and what goes with them into a folder made of them: without its own code a model would not load there."""


def model_folder(name_or_path: str) -> Path:
    """The folder of a model, downloaded first if it is a hub name.

    Raises:
        ModelError: no such folder, or the hub does not give it.
    """
    check_model_source(name_or_path)
    path = expanded(name_or_path)
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(_DOWNLOADED)))
    except (OSError, ValueError) as error:
        raise ModelError(
            "the model is no folder here, and the hub does not give it",
            where=f"--model_name_or_path {name_or_path}",
            got=str(error).strip().splitlines()[0],
            fix="check the name, the network and HF_HUB_OFFLINE",
        ) from error


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, not read yet."""

    file: Path
    shape: tuple[int, ...]
    nbytes: int


class StoredWeights:
    """The tensors of a model folder by name, in the order of its files. Each is read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all files.

        Raises:
            ModelError: no safetensors, a shard is missing or damaged.
        """
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for file in _files(folder):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118  (no mapping)
                        part = opened.get_slice(name)
                        shape = tuple(part.get_shape())
                        width = torch.empty(0, dtype=_DTYPES.get(part.get_dtype(), torch.float32)).element_size()
                        self.tensors[name] = Stored(file, shape, width * torch.Size(shape).numel())
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    "a file of the model is missing or damaged", where=file, got=str(error), fix="copy it again"
                ) from error

    def read(self, name: str) -> Tensor:
        """One tensor. Its file is mapped for this tensor alone, so that only its pages are in memory."""
        with safe_open(self.tensors[name].file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    @property
    def nbytes(self) -> int:
        """All tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "F64": torch.float64}


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / name for name in dict.fromkeys(named)]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                "the index of the weights is damaged", where=index, got=str(error), fix="copy it again"
            ) from error
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    raise ModelError(
        "the folder holds no weights in safetensors",
        where=folder,
        got=", ".join(sorted(path.name for path in folder.iterdir()))[:200],
        allowed=f"{WEIGHTS}, or {INDEX} with its shards",
        fix="convert the model: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
    )


class ShardWriter:
    """Writes tensors as they come into shards of a limited size, then the index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        """Write into `folder`, which exists."""
        self._folder = folder
        self._limit = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that belong together: they go into one shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._held and self._held_bytes + size > self._limit:
            self._flush()
        # A copy of what is a part of something larger or lies in a mapped file; safetensors wants whole storages.
        self._held.update({name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()})
        self._held_bytes += size
        self._total += size

    def finish(self) -> None:
        """Write what is left and give the shards their names."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(1).rename(self._folder / WEIGHTS)
            return
        names = {}
        for number, held in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self._folder / final)
            names.update(dict.fromkeys(held, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(names.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        if not self._held:
            return
        self._shards.append(list(self._held))
        try:
            save_file(self._held, self._part(len(self._shards)), metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(str(error)) from error
        self._held, self._held_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.safetensors"
