"""Ranks of a run: who am I, start and stop of the process group, sums and gathers over all ranks.

The only file beside `train/engine.py` that knows torch.distributed. Rank numbers come from the launcher's
environment alone; nobody else reads it.
"""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from anima.errors import AnimaError, ConfigError

T = TypeVar("T")

AFTER_HANG_MINUTES = 2.0
"""A collective gives up later than the watchdog, which knows more to say: it has the stack of every thread."""

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # before torch 2.13
_PIECE = 1 << 24
"""Elements that travel at a time when large tensors go to the host: what that costs on the device."""


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those of the run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and talks to people."""
        return self.rank == 0


def read_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Rank numbers as `deepspeed`, `torchrun` or plain `python` (one rank) give them.

    Raises:
        ConfigError: the environment names some of RANK, LOCAL_RANK, WORLD_SIZE but not all, or nonsense, or not
            where ranks meet; or srun alone has started several processes, which would all take themselves for rank 0.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    given = {name: environ[name] for name in names if name in environ}
    if not given:
        copies = environ.get("SLURM_STEP_NUM_TASKS", "1")
        if copies != "1":
            raise ConfigError(
                f"srun started {copies} copies of this program, and none knows its rank",
                where="SLURM_STEP_NUM_TASKS",
                got=copies,
                allowed="one task a node, and a launcher in it that starts the ranks",
                fix="sbatch … slurm/train.sbatch, or srun --ntasks-per-node=1 … torchrun …",
            )
        return Ranks()
    fix = f"start it by deepspeed or torchrun; or by plain python, with none of {' '.join(names)} set"
    if len(given) < len(names):
        raise ConfigError("the launcher's environment is incomplete", got=given, allowed=" ".join(names), fix=fix)
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]:
        what = "the launcher's environment does not say where ranks meet"
        raise ConfigError(what, where=" ".join(missing), got=given, fix=fix)
    try:
        ranks = Ranks(int(given["RANK"]), int(given["LOCAL_RANK"]), int(given["WORLD_SIZE"]))
    except ValueError:
        raise ConfigError("the launcher's rank numbers are no numbers", got=given, fix=fix) from None
    if not 0 <= ranks.rank < ranks.world_size or ranks.local_rank < 0:
        raise ConfigError("the launcher's rank numbers contradict each other", got=given, fix=fix)
    return ranks


def start(ranks: Ranks, device: torch.device, backend: str = "auto", *, hang_minutes: float = 30.0) -> None:
    """Create the process group: NCCL on GPUs, gloo on CPUs.

    A single process without a launcher gets a group of one on a free port of this machine, so that every
    run takes the same path. A collective that waits much longer than `hang_minutes` ends the process; the
    slowest legitimate wait is that for rank 0's samples.
    """
    if "RANK" not in os.environ:  # a MASTER_ADDR left from elsewhere is none of ours
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=hang_minutes + AFTER_HANG_MINUTES),
        device_id=device if backend == "nccl" else None,
    )


def stop() -> None:
    """Destroy the process group if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, in place, on the device; no host synchronisation."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_scattered(values: torch.Tensor, ranks: Ranks, travel: torch.dtype) -> torch.Tensor:
    """This rank's part of the mean of `values` over all ranks; on the device, no host synchronisation.

    Args:
        values: 1-D, fp32, with an equal part for every rank, in rank order. Overwritten.
        ranks: This process among the others.
        travel: Number format of what is sent; another than fp32 takes a copy.

    Returns:
        A view of `values`.
    """
    mine = values.chunk(ranks.world_size)[ranks.rank]
    if ranks.world_size > 1:
        sent = values.div_(ranks.world_size).to(travel)
        part = mine if travel == values.dtype else torch.empty_like(mine, dtype=travel)
        _reduce_scatter(part, sent)
        mine.copy_(part)
    return mine


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, in rank order, on every rank. Small objects only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_main(value: T) -> T:
    """Rank 0's `value` on every rank."""
    return gather_objects(value)[0]


def decided_by_main(ranks: Ranks, decide: Callable[[], T]) -> T:
    """What `decide` returns on rank 0, on every rank; a mistake that it finds there is raised on every rank.

    Raises:
        AnimaError: from `decide`.
    """
    found: T | AnimaError | None = None
    if ranks.is_main:
        try:
            found = decide()
        except AnimaError as error:
            found = error
    found = from_main(found)
    if isinstance(found, AnimaError):
        raise found
    return found  # type: ignore[return-value]


def gather_to_main(values: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
    """The 1-D `values` of every rank, equally long, in rank order, copied to rank 0's memory; elsewhere an empty list.

    Piece by piece, so that the device holds little more than before.

    Args:
        values: On the device, or in paged memory.
        device: Where collectives work.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    is_main = world_size == 1 or dist.get_rank() == 0
    gathered = [torch.empty(values.shape, dtype=values.dtype) for _ in range(world_size)] if is_main else []
    for start in range(0, values.numel(), _PIECE):
        mine = values[start : start + _PIECE].to(device)
        for source in range(world_size):
            piece = mine if source == 0 or dist.get_rank() == source else torch.empty_like(mine)
            if source:
                dist.broadcast(piece, src=source)
            if is_main:
                gathered[source][start : start + _PIECE].copy_(piece)
    return gathered


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
