"""The folder that a merge leaves: config, tokenizer with the training's template, stop tokens, record, model card."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from anima.data.encode import Encoder
from anima.data.jinja_templates import jinja_of
from anima.data.segments import Template
from anima.data.tokenizer import adds_bos
from anima.inference.adapter_folder import AdapterRecord, write_record
from anima.inference.stops import stop_ids
from anima.model.merge import NAMES, REQUANTIZED, Drift, Folding, Into
from anima.model.prequantize import copy_companions
from anima.model.weights import SHARD_BYTES

REPORT = "merge_report.json"
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class MergeRequest:
    """What is asked for; the fields are those of launch/merge.py."""

    adapters: tuple[str, ...]
    output_dir: str | None
    model_name_or_path: str | None = None
    original: str | None = None
    into: Into = "nf4"
    out_dtype: torch.dtype = torch.bfloat16
    max_drift: float = 0.5
    allow_drift: bool = False
    allow_mismatch: bool = False
    trust_remote_code: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class Prepared:
    """Everything a merge needs, checked."""

    request: MergeRequest
    records: tuple[AdapterRecord, ...]
    folding: Folding
    tokenizer: PreTrainedTokenizerBase
    template: Template
    notes: tuple[str, ...]


def write_companions(prepared: Prepared, folder: Path, encoder: Encoder, drifts: dict[str, Drift]) -> None:
    """Config, tokenizer with the training's template, stop tokens, record, report, model card."""
    request, folding, tokenizer = prepared.request, prepared.folding, prepared.tokenizer
    source = folding.original or folding.base
    copy_companions(source.folder, folder)
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    for stale in ("torch_dtype", "quantization_config", "_name_or_path"):
        config.pop(stale, None)
    config["dtype"] = str(request.out_dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    if prepared.template.name != "model":
        tokenizer.chat_template = jinja_of(prepared.template.name, adds_bos=adds_bos(tokenizer))
    tokenizer.save_pretrained(str(folder))
    _write_generation_config(prepared, folder, encoder)
    last = prepared.records[-1]
    write_record(folder, replace(last, model_name_or_path=str(folding.base.folder.resolve()), quantization="none"))
    report = {
        "adapters": list(request.adapters),
        "into": request.into,
        "drift": {name: vars(drift) for name, drift in drifts.items()},
        "notes": list(prepared.notes),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }
    _write_json(folder / REPORT, report)
    (folder / "README.md").write_text(_card(prepared, drifts), encoding="utf-8")


def _write_generation_config(prepared: Prepared, folder: Path, encoder: Encoder) -> None:
    """Whoever generates with it stops where training stopped."""
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    given = values.get("eos_token_id")
    stops = {int(prepared.tokenizer.eos_token_id), *stop_ids(prepared.template, encoder)}
    stops |= set(given if isinstance(given, list) else [] if given is None else [given])
    values["eos_token_id"] = sorted(stops)
    values.setdefault("pad_token_id", int(prepared.tokenizer.eos_token_id))
    _write_json(path, values)


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def drift_lines(drifts: dict[str, Drift]) -> list[str]:
    """The table of a merge."""
    head = f"{'difference of logits from base+adapter':<40}{'mean':>9}{'largest':>9}{'KL, nats':>11}{'same token':>12}"
    rows = [f"{name:<40}{d.mean:>9.4f}{d.largest:>9.3f}{d.kl:>11.2e}{d.agreement:>12.1%}" for name, d in drifts.items()]
    return [head, *rows]


def _card(prepared: Prepared, drifts: dict[str, Drift]) -> str:
    record, request = prepared.records[-1], prepared.request
    rows = "\n".join(
        f"| {name} | {d.mean:.4f} | {d.largest:.3f} | {d.kl:.2e} | {d.agreement:.1%} |" for name, d in drifts.items()
    )
    base = record.model_name_or_path
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [qlora, anima]
---
# {Path(request.output_dir or "").name}

{" + ".join(r.objective for r in prepared.records)} of `{Path(base).name if Path(base).is_absolute() else base}`, \
trained with Anima (QLoRA) and merged {NAMES[request.into]} in \
{str(request.out_dtype).removeprefix("torch.")}. Base fingerprint `{prepared.records[0].base_fingerprint}`. \
Chat template: {record.chat_template} (in the tokenizer). The base's licence holds for this model too.

Logits against base and adapter apart, on fixed conversations (this model is the first row):

| | mean difference | largest | KL (nats) | same most likely token |
|---|---|---|---|---|
{rows}

{REQUANTIZED}: what is to be expected when this model is loaded in 4 bits.

```python
from transformers import pipeline

chat = pipeline("text-generation", "PATH")
print(chat([{{"role": "user", "content": "Hello"}}], max_new_tokens=64)[0]["generated_text"][-1]["content"])
```
"""
