"""A peer's trainer in a process of its own, for bench_sft_peers.py: TRL's SFTTrainer, plain or under Unsloth.

Best settings of both: bf16, micro-batches of like length, paged 8-bit AdamW, no logging; TRL with Liger where that is
installed, Unsloth with its own kernels, checkpointing and (its default) batches without padding.
Unsloth's path ran through whole steps on a CPU with stand-ins for the GPU (2026.10.9; trl 1.15.0, datasets 4.8.5, as
it demands). For attention it takes xformers 0.0.35, which calls torch's flash kernels, where that loads: under a torch
for CUDA 13 it needs libcudart.so.12 on LD_LIBRARY_PATH too; otherwise torch's own, sequence by sequence.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LONGEST = 1024
ALPHA = 16


def main() -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("trl", "unsloth"), required=True)
    parser.add_argument("--work_dir", type=Path, required=True, help="holds checkpoint/ and passes.json")
    parser.add_argument("--report", type=Path, required=True, help="what was measured, as JSON")
    parser.add_argument("--sequences", type=int, required=True, help="of one optimizer step")
    parser.add_argument("--micro_batch", type=int, required=True, help="sequences")
    parser.add_argument("--lora_r", type=int, required=True)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--max_gpu_memory_gib", type=float)
    options = parser.parse_args()
    if options.peer == "unsloth":
        import unsloth  # noqa: F401  (it must come before trl, transformers and peft, which it changes)
    import torch

    if options.max_gpu_memory_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.max_gpu_memory_gib * 2**30 / total))
    passes = json.loads((options.work_dir / "passes.json").read_text("utf-8"))
    try:
        lines = train(options, passes)
    except torch.OutOfMemoryError:
        lines = [{"out_of_memory": True}]
    options.report.write_text(json.dumps(lines))


def load_trl(options: argparse.Namespace) -> tuple[Any, Any]:
    """The base in NF4 as PEFT's users load it, and the adapter that SFTTrainer shall put on it."""
    from bench_dpo_trl import load_nf4
    from peft import LoraConfig

    model = load_nf4(options.work_dir / "checkpoint")
    adapter = LoraConfig(r=options.lora_r, lora_alpha=ALPHA, bias="none", task_type="CAUSAL_LM", target_modules=MODULES)
    return model, adapter


def load_unsloth(options: argparse.Namespace) -> tuple[Any, None]:
    """The base in NF4 with Unsloth's adapter and kernels on it."""
    import torch
    from unsloth import FastLanguageModel

    recompute = "unsloth" if options.gradient_checkpointing else False
    model, _ = FastLanguageModel.from_pretrained(
        model_name=str(options.work_dir / "checkpoint"),
        max_seq_length=LONGEST,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=recompute,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.lora_r,
        target_modules=MODULES,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=recompute,
        random_state=0,
        max_seq_length=LONGEST,
    )
    return model, None


def train(options: argparse.Namespace, passes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Go through all passes with one trainer, and say how fast the timed ones were."""
    import pyarrow
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTTrainer

    on_gpu = torch.cuda.is_available()
    seconds: list[float] = []
    shapes: list[tuple[int, int]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        """From a step's batches being ready to its update being done, as our runs are timed."""

        began = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, *_: object, **__: object) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    model, adapter = load_unsloth(options) if options.peer == "unsloth" else load_trl(options)
    require_nf4(model)
    rows = [row for part in passes for row in part["rows"]]
    trainer = SFTTrainer(
        model=model,
        args=settings(options, sum(len(part["step_tokens"]) for part in passes), on_gpu),
        train_dataset=Dataset(pyarrow.Table.from_pylist(rows), fingerprint="rows"),  # nothing to hash
        processing_class=AutoTokenizer.from_pretrained(options.work_dir / "checkpoint"),
        peft_config=adapter,
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counted(examples: list[Any]) -> Any:
        """Its micro-batch as it is; counts tokens and positions of padding."""
        batch = collate(examples)
        shapes.append((real_tokens(batch), batch["input_ids"].numel()))
        return batch

    trainer.data_collator = counted
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    lines = measured(passes, seconds, shapes, options.sequences // options.micro_batch)
    return [{**line, "peak_gib": round(peak, 1), "versions": versions(options.peer, on_gpu)} for line in lines]


def require_nf4(model: Any) -> None:
    """Every linear layer but the head must be in NF4: Unsloth would quietly go on in 16 bits.

    Raises:
        SystemExit: Some layer is not.
    """
    from bitsandbytes.nn import Linear4bit

    quantised = sum(isinstance(module, Linear4bit) for module in model.modules())
    expected = len(MODULES) * model.config.num_hidden_layers
    if quantised != expected:
        raise SystemExit(f"{quantised} layers are in NF4 instead of {expected}: is bitsandbytes in working order?")


def real_tokens(batch: Any) -> int:
    """Tokens of a collated micro-batch without padding; without an attention mask it is one row of whole sequences."""
    for name in ("attention_mask", "packed_seq_lengths"):
        if name in batch:
            return int(batch[name].sum())
    return int(batch["input_ids"].numel())


def settings(options: argparse.Namespace, steps: int, on_gpu: bool) -> Any:
    """Optimizer and schedule of our runs, the trainer's fastest for the rest."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(options.work_dir / "trainer"),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.sequences // options.micro_batch,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        weight_decay=0.0,
        optim="paged_adamw_8bit",
        bf16=True,
        use_cpu=not on_gpu,
        gradient_checkpointing=options.gradient_checkpointing,
        max_length=LONGEST if options.peer == "unsloth" else None,  # no sequence is longer
        packing=False,
        train_sampling_strategy="sequential",  # rows were grouped by length before
        use_liger_kernel=on_gpu and options.peer == "trl" and importlib.util.find_spec("liger_kernel") is not None,
        disable_tqdm=True,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        seed=0,
    )


def measured(
    passes: Sequence[dict[str, Any]], seconds: Sequence[float], shapes: Sequence[tuple[int, int]], a_step: int
) -> list[dict[str, Any]]:
    """A line for each timed pass.

    Args:
        passes: With `grouped` (empty: not timed) and the tokens of each step.
        seconds: Of each step.
        shapes: Tokens and positions, with padding, of each micro-batch.
        a_step: Micro-batches of a step.

    Raises:
        SystemExit: The trainer's steps had other tokens than those that were handed over.
    """
    steps = [shapes[i : i + a_step] for i in range(0, len(shapes), a_step)]
    expected = [tokens for part in passes for tokens in part["step_tokens"]]
    counted = [sum(tokens for tokens, _ in step) for step in steps]
    if counted != expected or len(seconds) != len(expected):
        raise SystemExit(f"not the steps asked for: tokens {counted}, expected {expected}; {len(seconds)} were timed")
    lines, first = [], 0
    for part in passes:
        last = first + len(part["step_tokens"])
        if part["grouped"]:
            tokens = sum(counted[first:last])
            positions = sum(cells for step in steps[first:last] for _, cells in step)
            lines.append(
                {
                    "grouped": part["grouped"],
                    "tokens_per_second": round(tokens / sum(seconds[first:last])),
                    "step_seconds": round(statistics.median(seconds[first:last]), 3),
                    "tokens_per_step": tokens // (last - first),
                    "padding": round(1 - tokens / positions, 3),
                }
            )
        first = last
    return lines


def versions(peer: str, on_gpu: bool) -> dict[str, str]:
    """Of what decides the speed, as far as it is installed; and what Unsloth computes attention with."""
    own = ["unsloth", "unsloth_zoo"] if peer == "unsloth" else ["liger-kernel"] if on_gpu else []
    found = {}
    for name in ("torch", "transformers", "trl", *own):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if peer == "unsloth":
        from unsloth.utils.attention_dispatch import select_attention_backend

        found["attention"] = select_attention_backend(use_varlen=True)
    return found


if __name__ == "__main__":
    main()
