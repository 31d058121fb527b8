"""Adapters folded into a base, matrix by matrix, while a few rows run through all that could come of it.

One forward pass does it all: each linear layer reads its matrix when the pass reaches it, merges, hands the result to
the writer and lets go of it. Host memory is a few matrices and one shard, whatever the size of the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from anima.errors import ModelError
from anima.model.base_model import skeleton
from anima.model.compute import Compute
from anima.model.kernels import install_kernels
from anima.model.nf4 import fingerprint_choice, fingerprint_of, quantize
from anima.model.qlora_linear import Projection, fused_lora_linear
from anima.model.stored_adapter import StoredAdapter
from anima.model.stored_base import StoredBase, materialise
from anima.model.weights import ShardWriter

Into = Literal["nf4", "original"]
REFERENCE = "base+adapter"
REQUANTIZED = "merged, in NF4 again"
NAMES: Mapping[Into, str] = {"nf4": "into the NF4 base as trained", "original": "into the 16-bit original"}


@dataclass(frozen=True)
class Folding:
    """What is folded into what.

    Attributes:
        base: The first adapter's base.
        original: The same model in 16 bit, or None where it cannot be had.
        adapters: In the order of their training; each later one was trained on the merge of those before it.
        nf4: Whether they were trained over NF4.
        trained_dtype: Number format in which training dequantised.
        out_dtype: Number format of the merged model.
        compute: Where and in what the rows are computed.
    """

    base: StoredBase
    original: StoredBase | None
    adapters: tuple[StoredAdapter, ...]
    nf4: bool
    trained_dtype: torch.dtype
    out_dtype: torch.dtype
    compute: Compute

    def trained_base(self, layer: str, adapter: int) -> Tensor:
        """The matrix that adapter number `adapter` was trained over: earlier ones merged, in NF4 again."""
        matrix = self.base.dense(layer, self.trained_dtype, self.compute.device, nf4=self.nf4)
        if layer not in self.base.to_quantize:  # the output head: no adapter touches it
            return matrix
        for earlier in self.adapters[:adapter]:
            matrix = self._added(matrix, layer, earlier).to(self.trained_dtype)
            if self.nf4:
                matrix = quantize(matrix).dense(self.trained_dtype)
        return matrix

    def merged(self, layer: str, into: Into, last_base: Tensor) -> Tensor:
        """The layer's matrix with all adapters folded in, in `out_dtype`; `last_base` is what the last was trained
        over.
        """
        if into == "nf4":
            return self._added(last_base, layer, self.adapters[-1])
        source = self.original if self.original is not None else self.base
        matrix = source.weights.read(f"{layer}.weight").to(self.compute.device)
        for adapter in self.adapters:
            matrix = self._added(matrix, layer, adapter)
        return matrix.to(self.out_dtype)

    @property
    def expected_bytes(self) -> int:
        """Size of the merged model's tensors."""
        matrices = {f"{layer}.weight" for layer in self.base.to_quantize}
        numel = sum(torch.Size(self.base.shapes[name]).numel() for name in matrices)
        rest = (s.nbytes for name, s in self.base.weights.tensors.items() if name in self.base.shapes.keys() - matrices)
        return numel * self.out_dtype.itemsize + sum(rest)

    def fingerprint(self, adapter: int) -> str:
        """Fingerprint of the base that adapter number `adapter` must have been trained on."""
        if adapter == 0:
            return self.base.fingerprint(self.trained_dtype, self.compute.device, nf4=self.nf4)
        chosen = fingerprint_choice(self.base.to_quantize if self.nf4 else self.base.linear)
        return fingerprint_of(self.trained_base(layer, adapter) for layer in chosen)

    def _added(self, matrix: Tensor, layer: str, adapter: StoredAdapter) -> Tensor:
        update = adapter.update(layer, matrix.device)
        return matrix.to(self.out_dtype) if update is None else update.add_(matrix.float()).to(self.out_dtype)


@dataclass(frozen=True)
class Drift:
    """How far a model's logits are from those of base and adapter, over every position of the rows.

    Attributes:
        largest: Largest |difference|.
        mean: Mean |difference|.
        kl: Mean KL(base+adapter || this), nats a token.
        agreement: Share of the positions with the same most likely token.
    """

    largest: float
    mean: float
    kl: float
    agreement: float


def fold(
    folding: Folding,
    into: Into,
    rows: Sequence[Sequence[int]],
    *,
    writer: ShardWriter | None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Drift]:
    """Merge, write, and compare.

    Args:
        folding: What is folded into what.
        into: Which merge is written; the other one is computed for comparison where it can be.
        rows: Token ids that the models are compared on.
        writer: Takes the merged model's tensors; None: compare only.
        on_bytes: Called with the bytes of the base's matrices that are done, and all of them.

    Returns:
        Drift by the name of the merge; the one `into` first.
    """
    others: list[Into] = ["original"] if into == "nf4" else ["nf4"]
    if not folding.nf4 or folding.original is None:
        others = []
    pass_ = _Pass(folding, [into, *others], writer, on_bytes)
    model = _model_of(pass_)
    if writer is not None:
        _write_rest(folding, writer)
    names = [REFERENCE, *(NAMES[one] for one in pass_.merges), REQUANTIZED]
    width = max(len(row) for row in rows)
    # Filled up on the right: causal attention never looks there.
    filled = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=folding.compute.device)
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=filled.repeat(len(names), 1), use_cache=False).last_hidden_state
        drifts = _compare(hidden.chunk(len(names)), model.get_output_embeddings(), [len(row) for row in rows])
    missed = set(folding.base.to_quantize) - pass_.seen
    if missed:
        raise ModelError("the model does not use a layer of its own", where=folding.base.folder, got=sorted(missed)[0])
    return dict(zip(names[1:], drifts, strict=True))


@dataclass
class _Pass:
    """One forward pass over all variants of the model, stacked along the batch."""

    folding: Folding
    merges: list[Into]
    writer: ShardWriter | None
    on_bytes: Callable[[int, int], None]

    def __post_init__(self) -> None:
        self.seen: set[str] = set()
        base = self.folding.base
        self._done, self._total = 0, sum(base.matrix_bytes(layer) for layer in base.to_quantize)

    def outputs(self, layer: str, parts: Sequence[Tensor], bias: Tensor | None) -> Iterator[Tensor]:
        """The layer's outputs for the variants in order: reference, merges, the first merge in NF4 again."""
        folding, dtype = self.folding, self.folding.compute.dtype
        last_base = folding.trained_base(layer, len(folding.adapters) - 1)
        yield self._reference(layer, parts[0], last_base, bias)
        written = folding.merged(layer, self.merges[0], last_base)
        if self.writer is not None:
            self.writer.add({f"{layer}.weight": written})
        yield F.linear(parts[1], written.to(dtype), bias)
        for number, other in enumerate(self.merges[1:], start=2):
            yield F.linear(parts[number], folding.merged(layer, other, last_base).to(dtype), bias)
        yield F.linear(parts[-1], quantize(written).dense(folding.trained_dtype).to(dtype), bias)
        self.seen.add(layer)
        self._done += folding.base.matrix_bytes(layer)
        self.on_bytes(self._done, self._total)

    def _reference(self, layer: str, x: Tensor, last_base: Tensor, bias: Tensor | None) -> Tensor:
        """As training and chat compute it: the frozen matrix and the update apart."""
        last, weight = self.folding.adapters[-1], last_base.to(x.dtype)
        if layer not in last.matrices:
            return F.linear(x, weight, bias)
        frozen = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        frozen.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            frozen.bias = nn.Parameter(bias, requires_grad=False)
        a_RI, b_OR = (matrix.to(x.device, x.dtype) for matrix in last.matrices[layer])
        return fused_lora_linear(x, [Projection(frozen, a_RI, b_OR, last.scaling)])[0]


class _MergingLinear(nn.Module):
    """Stands where a linear layer stood."""

    def __init__(self, layer: str, pass_: _Pass, bias: Tensor | None) -> None:
        super().__init__()
        self._layer, self._pass, self._bias = layer, pass_, bias

    def forward(self, x: Tensor) -> Tensor:
        """(variants * batch, T, in) to (variants * batch, T, out)."""
        parts = x.chunk(len(self._pass.merges) + 2)
        return torch.cat(list(self._pass.outputs(self._layer, parts, self._bias)))


def _model_of(pass_: _Pass) -> PreTrainedModel:
    folding = pass_.folding
    model = skeleton(folding.base.settings)
    model.set_attn_implementation("sdpa")
    materialise(model, folding.base, folding.compute.dtype, folding.compute.device)
    install_kernels(model)
    for layer in folding.base.to_quantize:
        parent, _, child = layer.rpartition(".")
        module = model.get_submodule(layer)
        bias = module.bias if isinstance(module, nn.Linear) else None
        setattr(model.get_submodule(parent), child, _MergingLinear(layer, pass_, bias))
    model.eval()
    return model


def _write_rest(folding: Folding, writer: ShardWriter) -> None:
    """Embeddings, norms, biases, head: as they are stored, in the original where that is at hand."""
    matrices = {f"{layer}.weight" for layer in folding.base.to_quantize}
    source = folding.original or folding.base
    for name in folding.base.shapes:
        if name not in matrices and name in source.weights.tensors:
            writer.add({name: source.weights.read(name)})


def _compare(hidden: Sequence[Tensor], head: nn.Module, lengths: Sequence[int]) -> list[Drift]:
    """Drift of all variants but the first against the first; row by row, so that few logits exist at a time."""
    totals = [[0.0, 0.0, 0.0, 0.0] for _ in hidden[1:]]
    positions = sum(lengths)
    for row, length in enumerate(lengths):
        reference = head(hidden[0][row, :length]).float()
        logps = reference.log_softmax(-1)
        for total, other in zip(totals, hidden[1:], strict=True):
            logits = head(other[row, :length]).float()
            difference = (logits - reference).abs()
            total[0] = max(total[0], difference.max().item())
            total[1] += difference.mean(-1).sum().item() / positions
            total[2] += (logps.exp() * (logps - logits.log_softmax(-1))).sum().item() / positions
            total[3] += (logits.argmax(-1) == reference.argmax(-1)).sum().item() / positions
    return [Drift(*total) for total in totals]
