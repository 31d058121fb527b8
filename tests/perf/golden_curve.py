"""The same losses as the plain path: our packed, fused step against stock transformers + PEFT, on real weights.

    python tests/perf/golden_curve.py --steps 50 --dtype bf16 --json curve.json

Both begin with the same adapter over the same NF4 base and see the same sequences. Ours: packed rows, attention by
document, fused LoRA layers, DeepSpeed ZeRO-2, fp32 masters. Plain: one sequence a pass, transformers' attention,
PEFT's own layers with fp32 matrices under autocast, torch's AdamW; bf16 where ours is fp8.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from anima import distributed
from anima.config.schema import DataConfig, LoraConfig, ModelConfig, OptimizationConfig
from anima.data.encode import IGNORE_INDEX
from anima.data.loader import StepLoader
from anima.data.prepare import prepare
from anima.model.base_model import fingerprint, load_base
from anima.model.compute import choose_compute
from anima.model.lora import attach_lora, compute_in_fp8, trainable_parameters
from anima.model.packed import PackedModel
from anima.objectives.sft import SupervisedFineTuning
from anima.train.engine import Engine
from anima.train.metrics import MetricSums
from anima.train.optimizer import build_optimizer
from anima.train.step import train_step

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = OptimizationConfig(optimizer="adamw_torch", learning_rate=2e-4, max_grad_norm=1.0, weight_decay=0.0)
SEQUENCES = 8
LORA = LoraConfig(lora_r=16, lora_alpha=16, lora_dropout=0.0)


def ours(model: str, loader: StepLoader[Any], steps: int, compute: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses of our path, and the adapter that it began with."""
    adapted = attach_lora(load_base(ModelConfig(model_name_or_path=model), compute), LORA, dtype=compute.dtype, seed=0)
    if compute.fp8:
        compute_in_fp8(adapted, forward=compute.fp8 == "fp8")
    network = PackedModel(adapted, "cheap")
    parameters = trainable_parameters(network)
    started = {place(name): p.detach().float().clone() for name, p in parameters.items()}
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": SETTINGS.max_grad_norm,
        "bf16": {"enabled": compute.dtype == torch.bfloat16},
        "zero_optimization": {"stage": 2, "contiguous_gradients": False, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    optimizer = build_optimizer(parameters.values(), SETTINGS)
    engine = Engine(network, optimizer, settings, distributed.Ranks(), fingerprint)
    engine.train_mode()
    losses = []
    for step in range(steps):
        sums = MetricSums()
        train_step(engine, SupervisedFineTuning(), loader.step(step), SETTINGS.learning_rate, sums)
        losses.append(sums.reduce()["loss"])
    return losses, started


def plain(model: str, loader: StepLoader[Any], steps: int, compute: Any, started: dict[str, Any]) -> list[float]:
    """Losses of stock transformers and PEFT from the same adapter."""
    import peft

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute.dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        model, dtype=compute.dtype, quantization_config=quantization, device_map={"": compute.device}
    )
    lora = peft.LoraConfig(r=LORA.lora_r, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", bias="none")
    adapted = peft.get_peft_model(base, lora)
    adapted.train()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.data.copy_(started[place(name)])
    betas = (SETTINGS.adam_beta1, SETTINGS.adam_beta2)
    optimizer = torch.optim.AdamW(
        trained.values(), lr=SETTINGS.learning_rate, betas=betas, eps=SETTINGS.adam_epsilon, weight_decay=0.0
    )
    losses = []
    for step in range(steps):
        rows = [row for batch in loader.step(step) for row in documents(batch)]
        count = sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in rows)
        total = 0.0
        for ids, labels in rows:
            with torch.autocast(compute.device.type, dtype=compute.dtype, enabled=compute.dtype != torch.float32):
                logits = adapted(input_ids=ids[None].to(compute.device)).logits[0]
            loss = F.cross_entropy(logits[:-1].float(), labels[1:].to(compute.device), reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained.values(), SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def place(name: str) -> str:
    """Where in the decoder a parameter is, however it is wrapped."""
    return name.rpartition("layers.")[2]


def documents(batch: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The sequences of a packed row: ids and labels."""
    parts, begin = [], 0
    for length in batch.document_lengths:
        part = slice(begin, begin + length)
        parts.append((batch.input_ids.flatten()[part].long(), batch.labels.flatten()[part].long()))
        begin += length
    return parts


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(REPOSITORY / ".models" / "smollm2-135m-instruct"))
    parser.add_argument("--train_files", nargs="+", default=[str(REPOSITORY / "launch/data/quickstart_sft.jsonl")])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["bf16", "fp32", "fp8"], default="bf16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    compute = choose_compute("cuda" if torch.cuda.is_available() else "cpu", options.dtype, 0)
    distributed.start(distributed.Ranks(), compute.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = prepare(DataConfig(train_files=tuple(options.train_files)), tokenizer, seed=0)
    loader = StepLoader(
        data.train,
        global_batch_size=SEQUENCES,
        micro_batch_tokens=1024,
        packing=True,
        seed=0,
        rank=0,
        world_size=1,
    )
    mine, started = ours(options.model, loader, options.steps, compute)
    theirs = plain(options.model, loader, options.steps, compute, started)
    gaps = [abs(a - b) for a, b in zip(mine, theirs, strict=True)]
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True), start=1):
        print(f"{step:>3}  {a:.5f}  {b:.5f}  {a - b:+.5f}")
    mean = sum(gaps) / len(gaps)
    print(f"{options.dtype}: largest difference {max(gaps):.5f}, mean {mean:.5f}; {mine[0]:.4f} -> {mine[-1]:.4f}")
    if options.json:
        options.json.write_text(json.dumps({"ours": mine, "plain": theirs}))
    distributed.stop()


if __name__ == "__main__":
    main()
