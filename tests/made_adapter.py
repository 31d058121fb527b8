"""Adapters as runs leave them, for the tests of this folder."""

from pathlib import Path

import torch

from anima.config.schema import LoraConfig, ModelConfig
from anima.data.templates import make_template
from anima.inference.adapter_folder import AdapterRecord, rendering_of, writer
from anima.model.base_model import load_base
from anima.model.compute import Compute
from anima.model.lora import attach_lora, lora_b_parameters
from anima.model.nf4 import fingerprint
from anima.model.tokenizer import load_tokenizer

FP32 = Compute(torch.device("cpu"), torch.float32, "test")


def trained(folder: Path, base_dir: Path, seed: int, *, template: str = "model", **options: object) -> Path:
    """An adapter as a run leaves it, with matrices that matter."""
    quantization = str(options.get("quantization", "nf4"))
    config = ModelConfig(model_name_or_path=str(base_dir), quantization=quantization)  # type: ignore[arg-type]
    base = load_base(config, FP32)
    before = fingerprint(base)
    targets = options.get("targets", ("all-linear",))
    lora = LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=targets)  # type: ignore[arg-type]
    adapted = attach_lora(base, lora, dtype=torch.float32, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_b_parameters(adapted).values():
        parameter.data.normal_(0, 0.1, generator=generator)
    tokenizer = load_tokenizer(config)
    found = make_template(template, tokenizer)  # type: ignore[arg-type]
    record = AdapterRecord(str(base_dir), before, quantization, template, rendering_of(found), "sft", "", "cpu float32")
    folder.mkdir(parents=True)
    writer(adapted, tokenizer, record)(folder)
    return folder
