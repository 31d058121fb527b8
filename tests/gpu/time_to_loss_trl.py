"""TRL's SFTTrainer on one GPU for time_to_loss.py, which prepared tokens, loss masks and the adapter to begin with.

Its best settings for a small model: bf16, no recomputation, one micro-batch a step, Liger where it is installed.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

from turns import wait_for_turn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    """Read the flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--start", required=True, help="adapter to begin with")
    parser.add_argument("--rows", type=Path, required=True, help="input_ids and labels, in the order of the steps")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets step-N/ and report.json")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save_at", type=int, nargs="+", required=True)
    parser.add_argument("--global_batch_size", type=int, required=True)
    parser.add_argument("--micro_batch", type=int, required=True)
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--lr_scheduler_type", required=True)
    parser.add_argument("--warmup_ratio", type=float, required=True)
    parser.add_argument("--warm_up_steps", type=int, required=True, help="the clock starts behind them")
    parser.add_argument("--grouped", action="store_true", help="rows of one length together instead of our order")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    options = parser.parse_args()
    run(options)


def load(options: argparse.Namespace) -> Any:
    """The NF4 base, quantised now or stored so, with the adapter in PEFT's own layers."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = options.device == "cuda"
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    stored = "quantization_config" in json.loads((Path(options.model) / "config.json").read_text("utf-8"))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=dtype,
        device_map={"": 0 if on_gpu else "cpu"},
        attn_implementation="sdpa",
        **({} if stored else {"quantization_config": quantization}),
    )
    return PeftModel.from_pretrained(base, options.start, is_trainable=True)


def widen(model: Any) -> None:
    """TRL (1.16) makes the adapter over a 4-bit base bf16 and trains it so, without fp32 masters; here it is fp32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def run(options: argparse.Namespace) -> None:
    """Train, save adapters beside the clock, and write what was measured."""
    import pyarrow
    import torch
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from anima.train.schedule import learning_rate_at

    wait_for_turn()
    options.output_dir.mkdir(parents=True)
    on_gpu = options.device == "cuda"
    rows = [json.loads(line) for line in options.rows.read_text("utf-8").splitlines()]
    settings = SFTConfig(
        output_dir=str(options.output_dir / "trainer"),
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.global_batch_size // options.micro_batch,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="paged_adamw_8bit" if on_gpu else "adamw_torch",
        bf16=options.dtype == "bf16",
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        max_length=None,
        packing=False,
        train_sampling_strategy="group_by_length" if options.grouped else "sequential",
        use_liger_kernel=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
        logging_steps=10,
        logging_first_step=True,
        report_to="none",
        save_strategy="no",
        seed=0,
    )
    counts: list[Any] = []
    clock: dict[int, float] = {}
    losses: list[tuple[int, float]] = []

    class Trainer(SFTTrainer):  # type: ignore[misc]
        """Counts tokens, and takes our learning rates."""

        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            counts.append(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *rest, **named)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            def share(done: int) -> float:
                return learning_rate_at(
                    done + 1,
                    peak=1.0,
                    num_steps=options.steps,
                    warmup_ratio=options.warmup_ratio,
                    kind=options.lr_scheduler_type,
                )

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            return self.lr_scheduler

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Waits for the GPU only where it reads the clock; saving does not count."""

        resumed = began = time.perf_counter()
        passed = 0.0

        def on_train_begin(self, *_: object, **__: object) -> None:
            self.began = self.resumed = time.perf_counter()

        def on_step_end(self, args: object, state: Any, control: object, model: Any = None, **_: object) -> None:
            step = state.global_step
            if step != options.warm_up_steps and step not in options.save_at:
                return
            if on_gpu:
                torch.cuda.synchronize()
            self.passed += time.perf_counter() - self.resumed
            clock[step] = self.passed
            if step in options.save_at:
                model.save_pretrained(str(options.output_dir / f"step-{step}"))
            self.resumed = time.perf_counter()

        def on_log(self, args: object, state: Any, control: object, logs: Any = None, **_: object) -> None:
            if logs and "loss" in logs:
                losses.append((state.global_step, float(logs["loss"])))

    trainer = Trainer(
        model=load(options),
        args=settings,
        train_dataset=Dataset(pyarrow.Table.from_pylist(rows), fingerprint="rows"),  # nothing to hash
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[Clock()],
    )
    if options.dtype == "fp32":
        widen(trainer.model)
    trainer.train()
    a_step = options.global_batch_size // options.micro_batch
    tokens = [int(count) for count in counts]
    warm_up = clock[options.warm_up_steps]
    report = {
        "seconds": {step: seconds - warm_up for step, seconds in clock.items()},
        "warm_up_seconds": warm_up,
        "step_tokens": [sum(tokens[i : i + a_step]) for i in range(0, len(tokens), a_step)],
        "first_loss": losses[0][1],
        "losses": losses,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
    }
    (options.output_dir / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
