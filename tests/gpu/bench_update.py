"""The optimizer's part of a step alone, without a base: gradients reduced, norm, clipping, paged 8-bit AdamW.

    python tests/gpu/bench_update.py [--lora_r 64] [--free_gib 8 4 2 1] [--profile]

The adapter of the 33B shape with real ZeRO-2, and gradients that are drawn. `--free_gib` then takes the card's memory
until so much is left.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_sft import ZERO_2

from anima import distributed
from anima.config.schema import OptimizationConfig
from anima.model.compute import choose_compute, claim_device
from anima.train.engine import Engine
from anima.train.optimizer import build_optimizer

HIDDEN, WIDTH, LAYERS = 6656, 17920, 60
IN_OUT = (*((HIDDEN, HIDDEN),) * 4, *((HIDDEN, WIDTH),) * 2, (WIDTH, HIDDEN))
GIB = 2**30


class Adapter(nn.Module):
    """Only the LoRA matrices, named as in a model."""

    def __init__(self, rank: int, device: torch.device) -> None:
        super().__init__()
        for layer in range(LAYERS):
            for number, (inputs, outputs) in enumerate(IN_OUT):
                for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    parameter = nn.Parameter(torch.randn(shape, device=device, dtype=torch.bfloat16) / 100)
                    parameter.grad_dtype = torch.float32
                    self.register_parameter(f"layer{layer}_{number}_{name}", parameter)

    def forward(self) -> Tensor:
        """DeepSpeed wants a backward pass before it believes in gradients."""
        return next(self.parameters()).float().sum()


def main() -> None:
    """Print a line for each state of the memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora_r", type=int, default=64)
    parser.add_argument("--free_gib", type=float, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--profile", action="store_true", help="kernels and calls of one step")
    options = parser.parse_args()
    compute = choose_compute("cuda", "bf16", 0)
    claim_device(compute, None)
    distributed.start(distributed.Ranks(), compute.device)
    adapter = Adapter(options.lora_r, compute.device)
    optimizer = build_optimizer(list(adapter.parameters()), OptimizationConfig())
    engine = Engine(adapter, optimizer, ZERO_2, distributed.Ranks(), lambda _: "")
    numel = sum(parameter.numel() for parameter in adapter.parameters())
    print(f"{torch.cuda.get_device_name()}, {numel / 1e6:.0f} M parameters, states paged: ", end="")
    step(engine)
    print(engine.paged_state())
    report(engine, options.steps, "empty card")
    if options.profile:
        profile(engine)
    filler = []
    for free in options.free_gib:
        torch.cuda.empty_cache()
        step(engine)  # what it needs itself is held now
        there = torch.cuda.mem_get_info()[0] - int(free * GIB)
        if there > 0:
            filler.append(torch.full((there,), 1, dtype=torch.uint8, device=compute.device))
        report(engine, options.steps, f"{free:g} GiB left beside gradients")
    distributed.stop()


def step(engine: Engine) -> tuple[float, float]:
    """Seconds of the reduction and of the update."""
    with engine.accumulating():
        engine.backward(engine.network(), torch.ones((), device=engine.device))
        for parameter in engine.network.parameters():
            parameter.grad = torch.randn_like(parameter, dtype=torch.float32)
        torch.cuda.synchronize()
        began = time.perf_counter()
    torch.cuda.synchronize()
    reduced = time.perf_counter()
    engine.step(1e-4)
    torch.cuda.synchronize()
    return reduced - began, time.perf_counter() - reduced


def report(engine: Engine, steps: int, name: str) -> None:
    """Medians, and what the card has left."""
    taken = [step(engine) for _ in range(steps)]
    reduction, update = (1e3 * statistics.median(column) for column in zip(*taken, strict=True))
    print(
        f"{name}: reduction {reduction:.1f} ms, update {update:.1f} ms; {torch.cuda.mem_get_info()[0] / GIB:.1f} GiB "
        f"of the card free, allocator holds {torch.cuda.memory_reserved() / GIB:.1f}",
        flush=True,
    )


def profile(engine: Engine) -> None:
    """Kernels and calls of one step by time."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as found:
        step(engine)
    rows = found.key_averages()
    for column in ("self_device_time_total", "self_cpu_time_total"):
        print(column)
        for row in sorted(rows, key=lambda row: -getattr(row, column))[:22]:
            print(f"  {getattr(row, column) / 1e3:8.1f} ms {row.count:6d} x  {row.key[:100]}")


if __name__ == "__main__":
    main()
