"""What fp8 fuses, beside the separate kernels that it replaces: microseconds and GB/s, on the 33B shape, one layer.

    python tests/gpu/bench_fusions.py [--tokens 11000] [--tiles]

Tensors are larger than the cache; ten calls in a row are timed by events, so that a slow host does not count.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import cast

import bitsandbytes as bnb
import torch

from anima.model import fp8, fp8_kernels, kernels, row_kernels

HIDDEN, WIDTH = 6656, 17920
CALLS = 10
Work = Callable[[], object]


def main() -> None:
    """Print one line a fusion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=11000)
    parser.add_argument("--tiles", action="store_true", help="try other chunks and warps")
    options = parser.parse_args()
    torch.manual_seed(0)
    norms(options.tokens)
    swiglu(options.tokens)
    for name, widths in (("q, k, v", (HIDDEN,) * 3), ("gate, up", (WIDTH,) * 2)):
        group(name, widths, options.tokens)
    if options.tiles:
        for chunk, warps in ((1024, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32)):
            for module in (fp8_kernels, row_kernels):
                module.CHUNK, module.CHUNK_WARPS = chunk, warps
            tiles(f"chunk {chunk}, {warps} warps", options.tokens)


def random(*shape: int) -> torch.Tensor:
    """bf16 on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def seconds(work: Work) -> float:
    """Of one call, the best of three times ten."""
    work()
    times = []
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(CALLS):
            work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / CALLS)
    return min(times)


def compare(title: str, ways: dict[str, tuple[Work, float]]) -> None:
    """One line: of each way its microseconds, and GB/s for the bytes that it must move."""
    found = []
    for name, (work, size) in ways.items():
        time = seconds(work)
        found.append(f"{name} {time * 1e6:.0f} us ({size / time / 1e9:.0f} GB/s)")
    print(f"{title}: {'; '.join(found)}", flush=True)


def norms(tokens: int) -> None:
    """RMSNorm, forward and backward."""
    x, gradient, weight = random(1, tokens, HIDDEN), random(1, tokens, HIDDEN), random(HIDDEN)
    flat, count = x[0], tokens * HIDDEN
    with torch.no_grad():
        compare(
            "norm to e4m3",
            {
                "Liger": (lambda: kernels.rms_norm(x, weight, 1e-6), 4 * count),
                "rows to e4m3": (lambda: fp8_kernels.quantize_rows(flat), 3 * count),
                "ours alone": (lambda: row_kernels.rms_norm(flat, weight, 1e-6, with_rows=False), 4 * count),
                "ours with e4m3": (lambda: row_kernels.rms_norm(flat, weight, 1e-6, with_rows=True), 5 * count),
                "sum": (lambda: flat + gradient[0], 6 * count),
                "ours with sum and e4m3": (
                    lambda: row_kernels.rms_norm(flat, weight, 1e-6, added=gradient[0], with_rows=True),
                    9 * count,
                ),
            },
        )
    leaf = x.clone().requires_grad_()
    output = kernels.rms_norm(leaf, weight, 1e-6)
    inverse_norms = row_kernels.rms_norm(flat, weight, 1e-6, with_rows=False)[2]
    compare(
        "norm backward",
        {
            "Liger": (lambda: torch.autograd.grad(output, leaf, gradient, retain_graph=True), 6 * count),
            "ours": (lambda: row_kernels.rms_norm_gradient(gradient[0], flat, weight, inverse_norms), 6 * count),
            "ours with sum and e4m3": (
                lambda: row_kernels.rms_norm_gradient(
                    gradient[0], flat, weight, inverse_norms, residual=leaf.detach()[0], with_rows=True
                ),
                9 * count,
            ),
        },
    )


def swiglu(tokens: int) -> None:
    """The SwiGLU product, forward and backward."""
    gate, up, gradient = (random(1, tokens, WIDTH) for _ in range(3))
    parts, count = (gate[0], up[0]), tokens * WIDTH
    with torch.no_grad():
        compare(
            "SwiGLU to e4m3",
            {
                "Liger": (lambda: kernels.silu_product(gate, up), 6 * count),
                "rows to e4m3": (lambda: fp8_kernels.quantize_rows(parts[0]), 3 * count),
                "ours alone": (lambda: row_kernels.silu_product(*parts, with_rows=False), 6 * count),
                "ours with e4m3": (lambda: row_kernels.silu_product(*parts, with_rows=True), 7 * count),
            },
        )
    leaves = [part.clone().requires_grad_() for part in (gate, up)]
    output = kernels.silu_product(*leaves)
    compare(
        "SwiGLU backward to e4m3",
        {
            "Liger": (lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True), 10 * count),
            "two rows to e4m3": (lambda: [fp8_kernels.quantize_rows(part) for part in parts], 6 * count),
            "ours alone": (partial(gradients, gradient, parts, with_rows=False), 10 * count),
            "ours with e4m3": (partial(gradients, gradient, parts, with_rows=True), 12 * count),
        },
    )


def gradients(gradient: torch.Tensor, parts: tuple[torch.Tensor, torch.Tensor], *, with_rows: bool) -> object:
    """Values change from call to call, the time does not."""
    return row_kernels.silu_gradients_in_place(gradient[0], *parts, with_rows=with_rows)


def group(name: str, widths: tuple[int, ...], tokens: int) -> None:
    """The gradient of the input of several layers, apart and together, with LoRA's update."""
    layers = []
    for width in widths:
        layer = bnb.nn.Linear4bit(HIDDEN, width, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layer.load_state_dict({"weight": 0.02 * torch.randn(width, HIDDEN)})
        layers.append(cast(torch.nn.Linear, layer.cuda().requires_grad_(False)))
    fp8.enable_fp8(torch.nn.ModuleList(layers), [layers])
    parts = [random(tokens, width) for width in widths]
    left, right = random(tokens, 64 * len(widths)), 0.02 * random(64 * len(widths), HIDDEN)
    scales: list[fp8.WeightScales] = [layer.anima_fp8 for layer in layers]  # type: ignore[misc]
    count, weights = tokens * sum(widths), HIDDEN * sum(widths)
    compare(
        f"{name} to e4m3",
        {
            "apart": (lambda: [fp8_kernels.quantize_rows(part) for part in parts], 3 * count),
            "side by side": (lambda: fp8_kernels.quantize_side_by_side(parts), 3 * count),
        },
    )
    compare(
        f"{name} weights, transposed",
        {
            "apart": (
                lambda: [fp8.weight_in_fp8(layer, s, transposed=True) for layer, s in zip(layers, scales, strict=True)],
                1.5 * weights,
            ),
            "side by side": (lambda: fp8._side_by_side(layers), 1.5 * weights),
        },
    )

    def apart() -> torch.Tensor:
        total = fp8.product_transposed(parts[:1], layers[:1])
        for part, layer in zip(parts[1:], layers[1:], strict=True):
            total.add_(fp8.product_transposed([part], [layer]))
        return total.addmm_(left, right)

    rows = fp8_kernels.quantize_side_by_side(parts)
    joined = fp8._side_by_side(layers)
    flops = 2 * tokens * weights
    product = seconds(lambda: fp8._scaled_product(rows[0], joined, rows[1], scales[0].columns, torch.bfloat16))
    compare(
        f"{name} gradient of the input, all of it (one product alone: {product * 1e6:.0f} us, "
        f"{flops / product / 1e12:.0f} TFLOP/s)",
        {
            "apart": (apart, 0),
            "together": (lambda: fp8.product_transposed(parts, layers).addmm_(left, right), 0),
            "together, rows given": (lambda: fp8.product_transposed(parts, layers, rows).addmm_(left, right), 0),
        },
    )


def tiles(name: str, tokens: int) -> None:
    """The kernels that go over a row in chunks."""
    gate, up, gradient = (random(tokens, WIDTH) for _ in range(3))
    narrow = [random(tokens, HIDDEN) for _ in range(3)]
    count = tokens * WIDTH
    compare(
        name,
        {
            "q, k, v": (lambda: fp8_kernels.quantize_side_by_side(narrow), 9 * tokens * HIDDEN),
            "gate, up": (lambda: fp8_kernels.quantize_side_by_side((gate, up)), 6 * count),
            "SwiGLU": (lambda: row_kernels.silu_product(gate, up, with_rows=True), 7 * count),
            "backward": (partial(gradients, gradient[None], (gate, up), with_rows=True), 12 * count),
        },
    )


if __name__ == "__main__":
    main()
