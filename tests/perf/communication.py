"""What the ranks of a step send each other, counted in a real ZeRO-2 step, and what that makes of several GPUs.

    python tests/perf/communication.py --parameters 488e6 --step_seconds 0.92

Counts every collective of one optimizer step of 2 and 4 gloo ranks on a CPU, of a small model. From the bytes a
parameter, published link speeds and a measured step of one GPU follows an estimate for more of them: ring collectives,
nothing hidden behind computation, LATENCY a call. It is no measurement.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
MARK = "counted "
LINKS = {"NVLink 4 (H100)": 450e9, "NVLink 3 (A100)": 300e9, "PCIe 5 x16": 63e9, "PCIe 4 x16": 31.5e9}
"""Bytes a second and direction, as published."""
LATENCY = 50e-6
"""Seconds of a collective that moves nothing, generously."""
RANKS = (2, 4, 8)
KINDS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
}
"""Collectives that are counted, and what they are."""


def main() -> None:
    """Count, then estimate; or be a rank that counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=488e6, help="trainable ones")
    parser.add_argument("--step_seconds", type=float, nargs="+", default=[0.92, 2.9], help="of one GPU, measured")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        count()
        return
    bytes_each = {ranks: counted(ranks) for ranks in (2, 4)}
    per_parameter = bytes_each[2]
    print(f"\nbytes a trainable parameter and step, 4 ranks as 2: {bytes_each[4] == per_parameter}\n")
    print("| link | ranks | communication | " + " | ".join(f"efficiency, {s} s a step" for s in options.step_seconds))
    for link, speed in LINKS.items():
        for ranks in RANKS:
            seconds = estimate(per_parameter, options.parameters, ranks, speed)
            shares = " | ".join(f"{own / (own + seconds):.1%}" for own in options.step_seconds)
            print(f"| {link} | {ranks} | {seconds * 1e3:.0f} ms | {shares} |")


def estimate(per_parameter: dict[str, float], parameters: float, ranks: int, speed: float) -> float:
    """Seconds of a step's collectives over a ring (Thakur et al. 2005); a whole sum crosses a link twice, parts once.

    Args:
        per_parameter: Bytes of each kind of collective.
        parameters: Trainable ones.
        ranks: GPUs of a ring.
        speed: Bytes a second and direction of a link.
    """
    crossings = {"all_reduce": 2.0, "reduce_scatter": 1.0, "all_gather": 1.0}
    sent = sum(crossings[kind] * size * parameters * (ranks - 1) / ranks for kind, size in per_parameter.items())
    return sent / speed + len(per_parameter) * LATENCY


def counted(ranks: int) -> dict[str, float]:
    """Bytes a trainable parameter by kind of collective, in one step of so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, __file__, "--inside"], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if MARK in line).partition(MARK)[2])
    for line in found["lines"]:
        print(f"{ranks} ranks: {line}")
    return {kind: round(size / found["parameters"], 2) for kind, size in found["bytes"].items()}


def count() -> None:
    """One step on this rank; rank 0 prints what it sent."""
    import numpy as np
    import torch.distributed as dist

    seen: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for name in KINDS:  # before deepspeed is imported, which keeps some of them
        setattr(dist, name, noted(getattr(dist, name), name, seen, calls))
    from transformers import LlamaConfig

    from anima import distributed
    from anima.config.deepspeed_json import merge_deepspeed
    from anima.config.schema import Config, DataConfig, LoraConfig, ModelConfig, OptimizationConfig, OutputConfig
    from anima.data.batching import collate
    from anima.data.encode import TokenSequence
    from anima.model.base_model import fingerprint, load_base
    from anima.model.compute import choose_compute
    from anima.model.lora import attach_lora, trainable_parameters
    from anima.model.packed import PackedModel
    from anima.objectives.sft import SupervisedFineTuning
    from anima.train.engine import Engine
    from anima.train.metrics import MetricSums
    from anima.train.optimizer import build_optimizer
    from anima.train.step import train_step

    ranks = distributed.read_ranks()
    compute = choose_compute("cpu", "bf16", 0)
    distributed.start(ranks, compute.device)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=256, tie_word_embeddings=False, **shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        base = load_base(ModelConfig(model_name_or_path=folder, random_weights=True), compute)
    network = PackedModel(attach_lora(base, LoraConfig(lora_r=64), dtype=compute.dtype, seed=0), "cheap")
    parameters = list(trainable_parameters(network).values())
    optimizer = build_optimizer(parameters, OptimizationConfig())
    total = sum(parameter.numel() for parameter in parameters)
    config_of_a_run = Config(
        model=ModelConfig(model_name_or_path="-"),
        data=DataConfig(train_files=("-",)),
        output=OutputConfig(output_dir="-"),
    )
    settings = merge_deepspeed(config_of_a_run, bf16=True)
    engine = Engine(network, optimizer, settings, ranks, fingerprint)
    engine.train_mode()
    ids = np.arange(4, 68).astype(np.int32)
    batches = [collate([TokenSequence(ids, ids.copy())]) for _ in range(3)]
    train_step(engine, SupervisedFineTuning(), batches, 1e-4, MetricSums())
    seen.clear()
    calls.clear()
    train_step(engine, SupervisedFineTuning(), batches, 1e-4, MetricSums())
    if ranks.is_main:
        lines = [
            f"{name} of {dtype}: {calls[name, dtype]} calls, {size:,} bytes, {size / total:.4f} a trainable parameter"
            for (name, dtype), size in sorted(seen.items())
        ]
        sizes: Counter[str] = Counter()
        for (name, _), size in seen.items():
            if size >= total / 100:  # counts and flags are small
                sizes[KINDS[name]] += size
        print(MARK + json.dumps({"parameters": total, "bytes": sizes, "lines": lines}), flush=True)
    distributed.stop()


def noted(
    function: Callable[..., Any], name: str, seen: "Counter[tuple[str, str]]", calls: "Counter[tuple[str, str]]"
) -> Callable[..., Any]:
    """A collective that counts bytes: all that a sum runs over, or the whole of what is gathered."""
    place = 1 if KINDS[name] == "reduce_scatter" else 0  # behind what it fills

    def call(*arguments: Any, **named: Any) -> Any:
        tensor = [*arguments, *named.values()][place]
        parts = tensor if isinstance(tensor, list) else [tensor]
        key = (name, str(parts[0].dtype).removeprefix("torch."))
        seen[key] += sum(part.numel() * part.element_size() for part in parts)
        calls[key] += 1
        return function(*arguments, **named)

    return call


if __name__ == "__main__":
    main()
