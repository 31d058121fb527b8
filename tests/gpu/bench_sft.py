"""Speed and memory of SFT steps on one GPU: tokens/s with the optimizer, peak memory, share of the GEMM ceiling.

    python tests/gpu/make_shape.py --shape llama-33b --train_files DATA… --output_dir /tmp/llama-33b
    python tests/gpu/bench_sft.py --model /tmp/llama-33b --runs all:8192 cheap:4096 cheap:4096:fp8 --json out.json

Random weights in NF4, LoRA on all linear layers, sequence lengths drawn from the ancestor's data (log-normal fits to
its quantiles, cut at 512 + 512), real DeepSpeed ZeRO-2 and paged 8-bit AdamW. One line a run `recompute:tokens`;
`cheap/30:8192` lets 30 layers wait in host memory; `cheap:4096:fp8` computes in fp8 (or fp8_backward), and such runs
come last.
`--against trl unsloth` runs these on the same sequences afterwards (bench_sft_peers.py; --model llama-33b-8-layers).
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_sft_peers import add_flags, compare, failures, in_own_process, refuse
from bench_sft_sequences import step_rows
from transformers import AutoConfig

from anima import distributed
from anima.config.schema import LoraConfig, ModelConfig, OptimizationConfig
from anima.data.batching import assign, collate
from anima.inference.generate import generate_tokens
from anima.model.base_model import fingerprint, load_base
from anima.model.compute import choose_compute, claim_device
from anima.model.lora import attach_lora, compute_in_fp8, trainable_parameters
from anima.model.packed import PackedModel, generating
from anima.model.recompute import apply_policy
from anima.model.replay import recorder_for
from anima.objectives.sft import SupervisedFineTuning
from anima.train.engine import Engine
from anima.train.metrics import MetricSums
from anima.train.optimizer import build_optimizer
from anima.train.step import train_step

ZERO_2: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.3,
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": False,
    },
    "zero_allow_untested_optimizer": True,
    "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
}


def main() -> None:
    """Time our runs, then the peers that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--runs", nargs="+", required=True, metavar="RECOMPUTE[/OFFLOAD]:TOKENS[:FORM]")
    parser.add_argument(
        "--generate", nargs="*", type=int, default=[], help="also time answers, by batch, after the runs"
    )
    parser.add_argument("--profile", nargs="*", default=[], help="runs of which the kernels of a step are printed")
    options = parser.parse_args()
    refuse(parser, options)
    results = in_own_process(run_ours, options) if options.against else run_ours(options)
    save(results, options.json)
    if options.against:
        results += compare(options, results)
        save(results, options.json)
    if failures(results):
        sys.exit(1)


def save(results: list[dict[str, Any]], path: Path | None) -> None:
    """What was measured so far, if a file was asked for."""
    if path:
        path.write_text(json.dumps(results, indent=1))


def run_ours(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Build the model once, time every run, print a line for each."""
    compute = choose_compute("cuda", "bf16", 0)
    claim_device(compute, options.max_gpu_memory_gib)
    distributed.start(distributed.Ranks(), compute.device)
    engine = build(options.model, options.lora_r, compute)
    ceiling = gemm_ceiling()
    parameters = matmul_parameters(options.model)
    print(
        f"{torch.cuda.get_device_name()}, GEMM ceiling {ceiling / 1e12:.0f} TFLOP/s, to the host "
        f"{host_bandwidth() / 1e9:.0f} GB/s, {parameters / 1e9:.2f} B parameters"
    )
    results, computing = [], [""]
    for run in options.runs:
        policy, budget, *form = run.split(":")
        if form and form != computing:
            computing = form
            left = compute_in_fp8(engine.network.adapted, forward=form == ["fp8"])
            print(f"in {form[0]} but for {len(left)} matrices")
        result = measure(engine, policy, int(budget), options.sequences, options.steps)
        if "tokens_per_second" in result:
            result["share_of_ceiling"] = 4 * parameters * result["tokens_per_second"] / ceiling
        results.append({"run": run, **result})
        print(json.dumps(results[-1]), flush=True)
        if run in options.profile and "out_of_memory" not in result:
            profile(engine, int(budget), options.sequences)
    for batch in options.generate:
        results.append({"generate": batch, **generate(engine, batch)})
        print(json.dumps(results[-1]), flush=True)
    distributed.stop()
    return results


def build(model: str, lora_r: int, compute: Any) -> Engine:
    """The network under DeepSpeed, as launch/train.py builds it."""
    base = load_base(ModelConfig(model_name_or_path=model, random_weights=True), compute)
    adapted = attach_lora(base, LoraConfig(lora_r=lora_r), dtype=compute.dtype, seed=0)
    network = PackedModel(adapted, "all")
    parameters = list(trainable_parameters(network).values())
    optimizer = build_optimizer(parameters, OptimizationConfig())
    return Engine(network, optimizer, ZERO_2, distributed.Ranks(), fingerprint)


def step_batches(budget: int, sequences: int, seed: int) -> tuple[list[Any], int]:
    """Micro-batches of one step and their tokens."""
    rows = step_rows(sequences, seed)
    lengths = [len(row) for row in rows]
    shares = assign(lengths, world_size=1, micro_batch_tokens=budget, packing=True)[0]
    return [collate([rows[i] for i in part]) for part in shares], sum(lengths)


def measure(engine: Engine, policy: str, budget: int, sequences: int, steps: int) -> dict[str, Any]:
    """Median seconds of an optimizer step, tokens/s over all timed steps, peak memory; or where it ran out."""
    apply_policy(engine.network.causal_lm, policy)  # type: ignore[union-attr, arg-type]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    engine.train_mode()
    seconds, update, tokens = [], [], 0
    original = engine.step

    def timed(learning_rate: float) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        outcome = original(learning_rate)
        torch.cuda.synchronize()
        update.append(time.perf_counter() - began)
        return outcome

    engine.step = timed  # type: ignore[method-assign]
    drawn = [step_batches(budget, sequences, seed) for seed in range(1, steps + 1)]
    heaviest = max((batch for batches, _ in drawn for batch in batches), key=lambda batch: batch.input_ids.numel())
    try:
        for batches, count in [([heaviest], 0), *drawn]:  # launch/train.py tries it first too; it takes all memory
            torch.cuda.synchronize()
            started = time.perf_counter()
            train_step(engine, SupervisedFineTuning(), batches, 1e-4, MetricSums())
            torch.cuda.synchronize()
            if count:
                seconds.append(time.perf_counter() - started)
                tokens += count
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    finally:
        engine.step = original  # type: ignore[method-assign]
    return {
        "tokens_per_second": round(tokens / sum(seconds)),
        "step_seconds": round(statistics.median(seconds), 3),
        "tokens_per_step": tokens // steps,
        "update_seconds": round(statistics.median(update[1:]), 3),
        "micro_batches": len(drawn[-1][0]),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "held_gib": round(torch.cuda.memory_reserved() / 2**30, 1),
        "card_free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 1),
    }


def generate(engine: Engine, batch: int) -> dict[str, float]:
    """Tokens a second of greedy answers to prompts of 128, adapter in force: steps replayed, and each launched anew.

    Of answers of 24 and 72 tokens the second takes 48 steps more; what comes once (prompt, recording) is left out.
    """
    engine.eval_mode()
    model = engine.network.causal_lm  # type: ignore[union-attr]
    prompts = torch.randint(4, 32000, (batch, 128)).tolist()
    endless: Any = SimpleNamespace(eos_token_id=model.config.vocab_size)  # no answer ends before its time
    speeds = {}
    with generating(model):  # type: ignore[arg-type]
        for name, recorder in (("tokens_per_second", recorder_for(model.device)), ("launched_anew", None)):
            seconds = []
            for number in (24, 24, 72):  # the first one compiles
                torch.cuda.synchronize()
                began = time.perf_counter()
                generate_tokens(model, endless, prompts, max_new_tokens=number, recorder=recorder)
                seconds.append(time.perf_counter() - began)
            speeds[name] = round(batch * 48 / (seconds[2] - seconds[1]), 1)
    return speeds


def gemm_ceiling() -> float:
    """FLOP/s of an 8192^3 bf16 matrix product, measured now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return float(10 * 2 * 8192**3 / (time.perf_counter() - started))


def host_bandwidth() -> float:
    """Bytes a second from the device to pinned host memory."""
    device, host = torch.empty(2**30, dtype=torch.uint8, device="cuda"), torch.empty(2**30, dtype=torch.uint8)
    host = host.pin_memory()
    host.copy_(device)
    started = time.perf_counter()
    host.copy_(device)
    return 2**30 / (time.perf_counter() - started)


def matmul_parameters(model: str) -> int:
    """Parameters of the linear layers and the head: what a token is multiplied with."""
    c = AutoConfig.from_pretrained(model)
    hidden, inner = c.hidden_size, c.intermediate_size
    return int(c.num_hidden_layers * (4 * hidden * hidden + 3 * hidden * inner) + c.vocab_size * hidden)


def profile(engine: Engine, budget: int, sequences: int) -> None:
    """Kernels of one step by time, and how much of its wall time the GPU worked."""
    batches, _ = step_batches(budget, sequences, 99)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        train_step(engine, SupervisedFineTuning(), batches, 1e-4, MetricSums())
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    busy = sum(row.self_device_time_total for row in rows) / 1e6
    print(f"a step of {len(batches)} micro-batches: {wall:.3f} s, kernels {busy:.3f} s")
    for row in rows[:34]:
        print(f"  {row.self_device_time_total / 1e3:8.1f} ms {row.count:6d} x  {row.key[:110]}")


if __name__ == "__main__":
    main()
