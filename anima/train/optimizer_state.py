"""Masters and moments of the whole adapter as plain vectors, whatever the number of ranks that hold them.

Pure functions of host tensors. ZeRO cuts the flat vector of a parameter group into equal parts, one a rank, the last
one padded; an 8-bit moment is a code per element and a scale per block of 256, counted from the start of each part.
Knows neither deepspeed nor bitsandbytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anima.errors import CheckpointError

BLOCK = 256
"""Elements that share a scale: bitsandbytes' block size for optimizer states."""
_BLOCKS_AT_ONCE = 1 << 14
MASTER = "master"


@dataclass(frozen=True)
class RankState:
    """One rank's part.

    Attributes:
        vectors: "master" (fp32) and each moment (fp32, or uint8 codes), all of the part's length with padding.
        scales: Largest magnitude of each block, fp32 (blocks,), by moment; only for codes.
        maps: Value of each code, fp32 (256,), by moment; only for codes.
        scalars: Step counters.
    """

    vectors: dict[str, Tensor]
    scales: dict[str, Tensor] = field(default_factory=dict)
    maps: dict[str, Tensor] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupState:
    """A parameter group of all ranks.

    Attributes:
        parameters: (name, shape) in the order of the flat vector.
        part: Elements of a rank's part when it was saved, padding included: the blocks begin anew there.
        vectors: As in RankState, but (numel,), without padding.
        scales: Blocks of all parts, one part behind the other.
    """

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    part: int
    vectors: dict[str, Tensor]
    scales: dict[str, Tensor]
    maps: dict[str, Tensor]
    scalars: dict[str, float]

    @property
    def numel(self) -> int:
        """Elements without padding."""
        return sum(math.prod(shape) for _, shape in self.parameters)


def join(parameters: Sequence[tuple[str, tuple[int, ...]]], parts: Sequence[RankState]) -> GroupState:
    """The parts of all ranks, in rank order, as one state without padding."""
    first = parts[0]
    numel = sum(math.prod(shape) for _, shape in parameters)
    return GroupState(
        parameters=tuple(parameters),
        part=first.vectors[MASTER].numel(),
        vectors={name: torch.cat([part.vectors[name] for part in parts])[:numel] for name in first.vectors},
        scales={name: torch.cat([part.scales[name] for part in parts]) for name in first.scales},
        maps=first.maps,
        scalars=first.scalars,
    )


def cut(group: GroupState, part: int, rank: int, maps: Mapping[str, Tensor]) -> tuple[RankState, bool]:
    """This rank's part of a saved state, for any number of ranks.

    A block that covers the same elements as before moves bit by bit; the others are decoded and encoded anew, which
    rounds. All blocks stay whole if the old and the new parts are multiples of 256 elements.

    Args:
        group: What was saved.
        part: Elements of a part now, padding included.
        rank: Which part.
        maps: Value of each code by moment, where moments are to be 8-bit now; empty: they are to be fp32.

    Returns:
        The part, and whether every number in it is exactly what was saved.
    """
    start, stop = min(rank * part, group.numel), min((rank + 1) * part, group.numel)
    vectors, scales, exact = {}, {}, True
    for name, whole in group.vectors.items():
        coded = name in group.scales
        if name == MASTER or not (coded or name in maps):
            vectors[name] = _padded(whole[start:stop].float(), part)
        elif name not in maps:
            vectors[name] = _padded(_decode(group, name, start, stop), part)
        else:
            vectors[name], scales[name], same = _coded_part(group, name, part, start, stop, maps[name])
            exact = exact and same
    return RankState(vectors, scales, {name: maps[name] for name in scales}, dict(group.scalars)), exact


def _coded_part(
    group: GroupState, name: str, part: int, start: int, stop: int, codes: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Codes and scales of [start, stop): kept where a block was one before, else encoded anew."""
    starts = start + BLOCK * torch.arange(-(-part // BLOCK))
    kept = torch.zeros(len(starts), dtype=torch.bool)
    if name in group.scales:
        saved_part = starts // group.part
        within = starts - saved_part * group.part
        saved_end = torch.minimum(starts + BLOCK, (saved_part + 1) * group.part).clamp(max=group.numel)
        kept = (within % BLOCK == 0) & ((starts + BLOCK).clamp(max=stop) == saved_end) & (starts < stop)
    zero = int(codes.abs().argmin())
    values = torch.full((part,), zero, dtype=torch.uint8)
    scales = torch.zeros(len(starts))
    anew = ~kept & (starts < stop)
    if name in group.scales:
        values[: stop - start] = group.vectors[name][start:stop]
        places = (saved_part * -(-group.part // BLOCK) + within // BLOCK)[kept]
        scales[kept] = group.scales[name][places]
    for chunk in torch.arange(len(starts))[anew].split(_BLOCKS_AT_ONCE):
        for low, high in _runs(chunk.tolist()):
            first, last = start + low * BLOCK, min(start + high * BLOCK, stop)
            encoded, largest = encode(_decode(group, name, first, last), codes)
            values[first - start : last - start] = encoded
            scales[low:high] = largest
    return values, scales, not bool(anew.any())


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as half-open intervals."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return found


def _decode(group: GroupState, name: str, start: int, stop: int) -> Tensor:
    """Values of a moment in [start, stop), fp32."""
    saved = group.vectors[name][start:stop]
    if name not in group.scales:
        return saved.float()
    places = torch.arange(start, stop)
    part = places // group.part
    blocks = part * -(-group.part // BLOCK) + (places - part * group.part) // BLOCK
    return group.maps[name][saved.int()] * group.scales[name][blocks]


def encode(values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes of fp32 values and the largest magnitude of each block (Dettmers et al. 2022, section 2).

    Args:
        values: (n,); the last block may be short.
        codes: Value of each code, ascending, (256,).
    """
    blocks = -(-values.numel() // BLOCK)
    table = _padded(values, blocks * BLOCK).view(blocks, BLOCK)
    largest = table.abs().amax(dim=1)
    normalised = table / torch.where(largest == 0, torch.ones_like(largest), largest)[:, None]
    middles = (codes[1:] + codes[:-1]) / 2
    return torch.bucketize(normalised, middles).to(torch.uint8).flatten()[: values.numel()], largest


def _padded(values: Tensor, numel: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, numel - values.numel())).contiguous()


def to_files(groups: Sequence[GroupState]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Tensors by name for optimizer.safetensors, and what belongs to them for JSON."""
    tensors: dict[str, Tensor] = {}
    notes = []
    for number, group in enumerate(groups):
        for kind in ("vectors", "scales", "maps"):
            tensors |= {f"{number}.{kind}.{name}": tensor for name, tensor in getattr(group, kind).items()}
        notes.append({"parameters": group.parameters, "part": group.part, "scalars": group.scalars})
    return tensors, notes


def from_files(tensors: Mapping[str, Tensor], notes: Sequence[Mapping[str, Any]]) -> list[GroupState]:
    """What `to_files` was given."""
    groups = []
    for number, note in enumerate(notes):
        kinds = {
            kind: {
                name.split(".", 2)[2]: tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{number}.{kind}.")
            }
            for kind in ("vectors", "scales", "maps")
        }
        parameters = tuple((name, tuple(shape)) for name, shape in note["parameters"])
        groups.append(GroupState(parameters, int(note["part"]), **kinds, scalars=dict(note["scalars"])))
    return groups


def check_parameters(saved: GroupState, parameters: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Refuse a state of another adapter: positions alone would fit and mean something else.

    Raises:
        CheckpointError: names, shapes or their order differ; names the first difference.
    """
    now = list(parameters)
    for old, new in zip([*saved.parameters, ("nothing", ())], [*now, ("nothing", ())], strict=False):
        if old != new:
            raise CheckpointError(
                "the checkpoint holds another adapter",
                got=f"{old[0]} {list(old[1])} where this run has {new[0]} {list(new[1])}",
                fix="use the --lora_r and --lora_target_modules of the saved run",
            )
