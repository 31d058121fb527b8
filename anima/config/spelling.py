"""Did you mean: the nearest known names to a mistyped one.

Knows nothing about flags, YAML or JSON.
"""

import difflib
from collections.abc import Iterable

ELSEWHERE = {
    "adam8bit": "optimizer",
    "bf16": "compute_dtype",
    "bits": "quantization",
    "dataset": "train_files",
    "do_eval": "eval_size",
    "double_quant": "quantization",
    "epochs": "num_train_epochs",
    "eval_dataset_size": "eval_size",
    "evaluation_strategy": "eval_steps",
    "fp16": "compute_dtype",
    "gradient_accumulation_steps": "global_batch_size",
    "gradient_checkpointing": "recompute",
    "group_by_length": "packing",
    "lr": "learning_rate",
    "optim": "optimizer",
    "per_device_train_batch_size": "global_batch_size",
    "quant_type": "quantization",
    "report_to": "tracker",
    "resume_from_checkpoint": "resume",
    "sample_generate": "sample_prompts",
    "train_on_source": "train_on",
}
"""Names of the same thing in QLoRA's script and in transformers, for those who come from there."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely stands for.

    Args:
        name: What was written; leading dashes, case and hyphens do not count.
        known: The names that exist.
    """
    names = list(known)
    plain = name.lstrip("-").lower().replace("-", "_")
    if plain in names:
        return plain
    if ELSEWHERE.get(plain) in names:
        return ELSEWHERE[plain]
    starts = [item for item in names if len(plain) >= 3 and item.startswith(plain)]
    if len(starts) == 1:
        return starts[0]
    close = difflib.get_close_matches(plain, names, n=1, cutoff=0.6)
    return close[0] if close else None
