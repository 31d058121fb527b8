"""The longest sequence that one GPU trains on: one step on one document of so many tokens, its time and its memory.

    python tests/gpu/longest_sequence.py --tokens 131072 262144 400000 --recompute all/28 --json out.json
    python tests/gpu/longest_sequence.py --tokens 400000 --sliding_window 4096 --recompute all/28

The shape of an 8B model (llama-8b of make_shape.py) with random weights in NF4, LoRA r=32 on all linear layers, real
DeepSpeed ZeRO-2 and paged 8-bit AdamW, every token supervised, nothing cut. Full attention over 400,000 tokens takes
minutes a step: `--sliding_window W` takes Mistral's architecture, which has the same tensors and needs the same memory,
but looks W tokens back, so that a step takes time in proportion to its tokens. `--layers N` for a short trial: the
memory of one layer at work is the same. One line a length; it ends at the first that does not fit.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_sft import build
from make_shape import SHAPES
from transformers import LlamaConfig, MistralConfig

from anima import distributed
from anima.data.batching import collate
from anima.data.encode import TokenSequence
from anima.free_memory import free_host_memory
from anima.model.compute import choose_compute, claim_device
from anima.model.recompute import apply_policy, host_memory_held
from anima.objectives.sft import SupervisedFineTuning
from anima.train.engine import Engine
from anima.train.metrics import MetricSums
from anima.train.step import train_step

GIB = 2**30


def main() -> None:
    """Build the model, try every length, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, required=True, help="lengths to try, ascending")
    parser.add_argument("--recompute", default="all/28", help="as of launch/train.py")
    parser.add_argument("--layers", type=int, default=SHAPES["llama-8b"]["num_hidden_layers"])
    parser.add_argument("--sliding_window", type=int, help="tokens that attention looks back; without it all")
    parser.add_argument("--lora_r", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1, help="steps of each length; the time is that of the last")
    parser.add_argument("--max_gpu_memory_gib", type=float)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compute = choose_compute("cuda", "bf16", 0)
    claim_device(compute, options.max_gpu_memory_gib)
    distributed.start(distributed.Ranks(), compute.device)
    with tempfile.TemporaryDirectory() as folder:
        write_shape(Path(folder), options.layers, options.sliding_window)
        engine = build(folder, options.lora_r, compute)
    apply_policy(engine.network.causal_lm, options.recompute)  # type: ignore[union-attr, arg-type]
    print(
        f"{torch.cuda.get_device_name()}, {torch.cuda.memory_allocated() / GIB:.1f} GiB before the first step, "
        f"host memory: {free_host_memory()}",
        flush=True,
    )
    results = []
    for tokens in options.tokens:
        asked = {"recompute": options.recompute, "layers": options.layers, "sliding_window": options.sliding_window}
        results.append({"tokens": tokens, **asked, **measure(engine, tokens, options.steps)})
        print(json.dumps(results[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        if "out_of_memory" in results[-1]:
            break
    distributed.stop()


def write_shape(folder: Path, layers: int, window: int | None) -> None:
    """config.json of the shape; no tokenizer is needed."""
    shape = {
        **SHAPES["llama-8b"],
        "num_hidden_layers": layers,
        "max_position_embeddings": 2**20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
    }
    if window is None:
        config, kind = LlamaConfig(**shape), "LlamaForCausalLM"
    else:
        config, kind = MistralConfig(**shape, sliding_window=window, head_dim=128), "MistralForCausalLM"
    config.architectures = [kind]
    config.save_pretrained(folder)


def measure(engine: Engine, tokens: int, steps: int) -> dict[str, Any]:
    """Seconds of the last step, peak memory on both sides, the loss; or what ran out."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.train_mode()
    model: Any = engine.network.causal_lm  # type: ignore[union-attr]
    ids = np.random.default_rng(0).integers(4, SHAPES["llama-8b"]["vocab_size"], tokens).astype(np.int32)
    batch = collate([TokenSequence(ids, ids.copy())])
    try:
        for _ in range(steps):
            sums = MetricSums()
            torch.cuda.synchronize()
            began = time.perf_counter()
            outcome = train_step(engine, SupervisedFineTuning(), [batch], 1e-4, sums)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". GPU")[0]
        return {"out_of_memory": reason, "host_gib": round(host_memory_held(model) / GIB, 1)}
    return {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "host_gib": round(host_memory_held(model) / GIB, 1),
        "skipped": outcome.skipped,
        "grad_norm": outcome.grad_norm,
    }


if __name__ == "__main__":
    main()
