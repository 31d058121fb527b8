"""The client optimizer that DeepSpeed shards: bitsandbytes' paged 8-bit AdamW unless another is asked for.

Also how that optimizer keeps its state, to take it out and put it back.
"""

from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import create_dynamic_map, get_paged
from bitsandbytes.optim.optimizer import Optimizer2State
from torch import Tensor, nn

from anima.config.schema import OptimizationConfig
from anima.train.optimizer_state import MASTER, RankState

_PAGED_FROM = 100_000
"""Elements from which bitsandbytes pages a state (Optimizer8bit.get_state_buffer)."""


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizationConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) over the adapter.

    On a CPU the paged class runs unpaged, with real 8-bit states.
    """
    betas = (config.adam_beta1, config.adam_beta2)
    trained = list(parameters)
    if config.optimizer == "adamw_torch":
        return torch.optim.AdamW(
            trained, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
        )
    kind = bnb.optim.PagedAdamW8bit if config.optimizer == "paged_adamw_8bit" else bnb.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(
        trained, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    return optimizer


def take_out(master: Tensor, entry: dict[str, Any]) -> RankState:
    """The state of one flat parameter as it lies on the device; nothing is copied.

    Args:
        master: The parameter, fp32.
        entry: The optimizer's entry for it; empty before the first step.
    """
    state = RankState({MASTER: master.detach()})
    for name, value in entry.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            state.scalars[name] = float(value)
        elif name.startswith("absmax"):
            state.scales[f"state{name.removeprefix('absmax')}"] = value
        elif name.startswith("qmap"):
            state.maps[f"state{name.removeprefix('qmap')}"] = value
        else:
            state.vectors[name] = value
    return state


def code_maps(optimizer: torch.optim.Optimizer, numel: int) -> dict[str, Tensor]:
    """Value of each code by moment, if the optimizer keeps 8-bit moments for a parameter of so many elements."""
    if not isinstance(optimizer, Optimizer2State) or numel < _min_8bit_size(optimizer):
        return {}
    return {"state1": create_dynamic_map(signed=True), "state2": create_dynamic_map(signed=False)}


def _min_8bit_size(optimizer: Any) -> int:  # noqa: ANN401  (a class without types)
    return int(optimizer.args.min_8bit_size)


def put_back(optimizer: torch.optim.Optimizer, master: Tensor, state: RankState) -> None:
    """Give the optimizer a state for `master`, on its device, and paged where bitsandbytes would page it.

    bitsandbytes' own load_state_dict makes plain device tensors of paged ones (0.50): after it, a run needs more GPU
    memory than before.
    """
    master.data.copy_(state.vectors[MASTER])
    if len(state.vectors) == 1:
        return
    entry: dict[str, Any] = {}
    if isinstance(optimizer, Optimizer2State):
        entry |= {name: int(value) for name, value in state.scalars.items()}
        paged = will_be_paged(optimizer, master)
    else:
        entry |= {name: torch.tensor(value) for name, value in state.scalars.items()}
        paged = False
    for name, vector in state.vectors.items():
        if name != MASTER:
            entry[name] = _paged(optimizer, vector, master.device) if paged else vector.to(master.device, copy=True)
    for name, scales in state.scales.items():
        entry[f"absmax{name.removeprefix('state')}"] = scales.to(master.device)
    for name, codes in state.maps.items():
        entry[f"qmap{name.removeprefix('state')}"] = codes.to(master.device)
    optimizer.state[master] = entry


def _paged(optimizer: Any, values: Tensor, device: torch.device) -> Tensor:  # noqa: ANN401  (a class without types)
    buffer: Tensor = get_paged(*values.shape, dtype=values.dtype, device=device)
    buffer.copy_(values)
    optimizer.page_mng.paged_tensors.append(buffer)
    return buffer


def moment_bytes(optimizer: torch.optim.Optimizer, master: Tensor) -> int:
    """Bytes of the two moments of `master`."""
    return master.numel() * (2 if code_maps(optimizer, master.numel()) else 8)


def will_be_paged(optimizer: torch.optim.Optimizer, master: Tensor) -> bool:
    """True if the moments of `master` will be able to leave the device."""
    can = isinstance(optimizer, Optimizer2State) and optimizer.is_paged and master.device.type == "cuda"
    return can and master.numel() >= _PAGED_FROM


def is_paged(optimizer: torch.optim.Optimizer, master: Tensor) -> bool:
    """True if the moments of `master` lie in paged memory."""
    return any(getattr(value, "is_paged", False) for value in optimizer.state.get(master, {}).values())
