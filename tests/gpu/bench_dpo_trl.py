"""TRL's DPOTrainer on one GPU for bench_dpo.py: NF4 base, LoRA, the base with its adapter off as reference, Liger.

Needs trl and, on a GPU, liger-kernel; started by bench_dpo.py, which wrote the pairs.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

PAIRS = 16
WARM_UP_STEPS = 2


def main() -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape_dir", type=Path, required=True, help="config and tokenizer")
    parser.add_argument("--work_dir", type=Path, required=True, help="holds trl_pairs.jsonl, gets the checkpoint")
    parser.add_argument("--report", type=Path, required=True, help="what was measured, as JSON")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--micro_batch", type=int, required=True)
    parser.add_argument("--lora_r", type=int, required=True)
    run(parser.parse_args())


def save_checkpoint(shape: Path, folder: Path) -> None:
    """Random weights of a shape in bf16, as TRL has to load them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="4GB")
        for path in shape.glob("tokenizer*"):
            shutil.copy(path, folder)
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


def load_nf4(folder: Path) -> Any:
    """A 16-bit folder quantised to NF4 as PEFT's users load it; bf16, torch's attention."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        attn_implementation="sdpa",
    )


def run(options: argparse.Namespace) -> None:
    """Train, and write what was measured."""
    import pyarrow
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    folder: Path = options.work_dir / "trl-checkpoint"
    save_checkpoint(options.shape_dir, folder)
    rows = [json.loads(line) for line in (options.work_dir / "trl_pairs.jsonl").read_text("utf-8").splitlines()]
    mean_tokens = sum(row.pop("tokens") for row in rows) / len(rows)
    gpu = torch.cuda.is_available()
    model = load_nf4(folder)
    settings = DPOConfig(
        output_dir=str(options.work_dir / "trl-run"),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=PAIRS // options.micro_batch,
        max_steps=options.steps,
        learning_rate=1e-4,
        bf16=gpu,
        use_cpu=not gpu,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        max_length=600,
        optim="paged_adamw_8bit" if gpu else "adamw_torch",
        gradient_checkpointing=True,
        beta=0.1,
        use_liger_kernel=gpu,
    )
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=options.lora_r, lora_alpha=16, bias="none", task_type="CAUSAL_LM", target_modules=modules)
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is partly untyped
        def on_step_end(self, *_: object, **__: object) -> None:
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset(pyarrow.Table.from_pylist(rows), fingerprint="pairs"),  # nothing to hash
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=adapter,
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = (ends[-1] - ends[WARM_UP_STEPS - 1]) / (len(ends) - WARM_UP_STEPS)
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    report = {
        "name": f"trl, {options.shape_dir.name}, micro-batch {options.micro_batch}",
        "seconds_per_step": seconds,
        "tokens_per_second": mean_tokens * PAIRS / seconds,
        "peak_gib": peak,
    }
    options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
