"""Time of every kernel around the frozen base, on the matrices of the 33B shape: microseconds, GB/s or TFLOP/s.

    python tests/gpu/bench_kernels.py [--tokens 4096] [--tiles]

One pass over 33B reads 60 x (4 matrices of 6656 x 6656 and 3 of 17920 x 6656). Inputs are rotated, so that nothing is
read from the cache; medians by events.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch

from anima.model import fp8, fp8_kernels, kernels, nf4_kernels
from anima.model.nf4 import Quantized, dequantize_4bit, quantize, unpack

SHAPES = ((6656, 6656), (17920, 6656), (6656, 17920))
COUNTS = (240, 120, 60)
"""Matrices of each shape in the network: attention, gate and up, down."""
COPIES = 3


def main() -> None:
    """Print one line a kernel and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--tiles", action="store_true", help="try tiles of the NF4 kernel")
    options = parser.parse_args()
    torch.manual_seed(0)
    matrices = {shape: [quantize(random(*shape)) for _ in range(COPIES)] for shape in SHAPES}
    read_nf4(matrices)
    if options.tiles:
        try_tiles(matrices)
    for tokens in options.tokens:
        products(matrices, tokens)
        elementwise(tokens)


def random(*shape: int) -> torch.Tensor:
    """bf16 on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def seconds(work: Callable[[int], object], repeats: int = 21) -> float:
    """Median time of work(i), i = 0, 1, 2 in turn."""
    for i in range(COPIES):
        work(i)
    times = []
    for i in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work(i % COPIES)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def read_nf4(matrices: dict[tuple[int, int], list[Quantized]]) -> None:
    """NF4 to bf16 by bitsandbytes and by us, and to e4m3; the sum is a pass over 33B."""
    one = torch.ones((), device="cuda")
    e4m3 = torch.float8_e4m3fn
    ways: dict[str, Callable[[Quantized], object]] = {
        "bitsandbytes bf16": lambda q: dequantize_4bit(q.packed, q.state),
        "ours bf16": lambda q: unpack(q.packed, q.state, torch.bfloat16),
        "ours e4m3": lambda q: unpack(q.packed, q.state, e4m3, inverse_scale=one),
        "ours e4m3 transposed": lambda q: unpack(q.packed, q.state, e4m3, inverse_scale=one, transposed=True),
    }
    for found in matrices.values():
        assert torch.equal(ways["bitsandbytes bf16"](found[0]), ways["ours bf16"](found[0]))
    for name, way in ways.items():
        times = [seconds(lambda i, q=found, w=way: w(q[i])) for found in matrices.values()]
        total = sum(t * n for t, n in zip(times, COUNTS, strict=True))
        size = (1 if "e4m3" in name else 2) + 0.5
        rate = sum(a * b * n for (a, b), n in zip(SHAPES, COUNTS, strict=True)) * size / total
        print(f"NF4, {name:22} {us(times)} us; a pass over 33B {total * 1e3:.1f} ms, {rate / 1e9:.0f} GB/s", flush=True)


def try_tiles(matrices: dict[tuple[int, int], list[Quantized]]) -> None:
    """The best tiles of our kernel on the largest matrix."""
    found = matrices[SHAPES[1]]
    sizes = {
        False: ((1, 2048), (4, 1024), (8, 1024), (16, 256)),
        True: ((64, 64), (64, 256), (128, 64), (128, 256), (128, 128)),
    }
    for dtype, transposed in ((torch.bfloat16, False), (torch.float8_e4m3fn, False), (torch.float8_e4m3fn, True)):
        results = []
        for (rows, columns), warps in product(sizes[transposed], (2, 4, 8)):
            way = partial(with_tile, found, dtype, transposed, (rows, columns, warps))
            results.append((seconds(way, 9), (rows, columns, warps)))
        best = ", ".join(f"{tile} {time * 1e6:.0f}" for time, tile in sorted(results)[:5])
        print(f"tiles {dtype} transposed={transposed}: {best} us", flush=True)


def with_tile(
    matrices: list[Quantized], dtype: torch.dtype, transposed: bool, tile: tuple[int, int, int], i: int
) -> torch.Tensor:
    """`unpack` with a tile of our choice."""
    matrix = matrices[i]
    state: Any = matrix.state
    return nf4_kernels.unpack(
        matrix.packed,
        state.absmax,
        (state.state2.code, state.state2.absmax, state.offset),
        state.code,
        tuple(state.shape),
        dtype,
        blocksize=state.blocksize,
        groupsize=state.state2.blocksize,
        transposed=transposed,
        tile=tile,
    )


def products(matrices: dict[tuple[int, int], list[Quantized]], tokens: int) -> None:
    """Matrix products forward (x W^T) and backward (g W), bf16 and e4m3, and the LoRA epilogue."""
    for (rows, columns), found in matrices.items():
        dense = [q.dense(torch.bfloat16) for q in found]
        x, g = [[random(tokens, n) for _ in range(COPIES)] for n in (columns, rows)]
        down, b, a = random(tokens, 64), random(rows, 64), random(64, columns)
        flops = 2 * tokens * rows * columns
        half = {
            "forward": lambda i, x=x, w=dense: x[i] @ w[i].T,
            "backward": lambda i, g=g, w=dense: g[i] @ w[i],
        }
        for name, work in half.items():
            time = seconds(work)
            print(f"{tokens} x {rows} x {columns} bf16 {name:9} {time * 1e6:.0f} us, {flops / time / 1e12:.0f} TFLOP/s")
        epilogue = seconds(lambda i, g=g, d=down, b=b: g[i].addmm_(d, b.T, alpha=0.25))
        lora = seconds(lambda i, x=x, a=a: x[i] @ a.T)
        grads = seconds(lambda i, x=x, d=down: torch.mm(d.T, x[i], out_dtype=torch.float32))
        print(f"    LoRA: down {lora * 1e6:.0f} us, epilogue {epilogue * 1e6:.0f} us, gradient {grads * 1e6:.0f} us")
        weight = [w.to(torch.float8_e4m3fn) for w in dense]
        flipped = [w.T.contiguous() for w in weight]
        for name, inputs, w in (("forward", x, weight), ("backward", g, flipped)):
            scale = torch.ones(1, w[0].shape[0], device="cuda")
            quantized = [fp8_kernels.quantize_rows(v) for v in inputs]
            time = seconds(
                lambda i, q=quantized, w=w, s=scale: fp8._scaled_product(q[i][0], w[i], q[i][1], s, torch.bfloat16)
            )
            rowwise = seconds(lambda i, v=inputs: fp8_kernels.quantize_rows(v[i]))
            print(
                f"{tokens} x {rows} x {columns} e4m3 {name:9} {time * 1e6:.0f} us, {flops / time / 1e12:.0f} TFLOP/s; "
                f"rows to e4m3 {rowwise * 1e6:.0f} us",
                flush=True,
            )


def elementwise(tokens: int) -> None:
    """Norm, SwiGLU, rotation, attention: one layer, forward; and a copy of the hidden states."""
    x, gate, up = random(1, tokens, 6656), random(1, tokens, 17920), random(1, tokens, 17920)
    weight, out = random(6656), torch.empty(1, tokens, 6656, device="cuda", dtype=torch.bfloat16)
    query, key = (random(1, tokens, 52, 128).transpose(1, 2) for _ in range(2))
    angles = random(1, tokens, 128)
    ways: dict[str, Callable[[int], object]] = {
        "copy": lambda i: out.copy_(x),
        "norm": lambda i: kernels.rms_norm(x, weight, 1e-6),
        "SwiGLU": lambda i: kernels.silu_product(gate, up),
        "rotation": lambda i: kernels.rotate(query, key, angles, angles),
    }
    with torch.no_grad():
        print(f"{tokens} tokens:", ", ".join(f"{n} {seconds(w) * 1e6:.0f} us" for n, w in ways.items()), flush=True)


def us(times: list[float]) -> str:
    """Microseconds, by shape."""
    return " ".join(f"{time * 1e6:.0f}" for time in times)


if __name__ == "__main__":
    main()
