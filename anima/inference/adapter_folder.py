"""What lies beside an adapter's weights, so that whoever uses them talks to it as training did.

`anima.json`: base and its fingerprint, template's name, the rendering of a fixed conversation. A chat whose
template renders that conversation otherwise would not be the chat that was trained.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from anima.config.paths import expanded
from anima.data.records import Conversation, Message
from anima.data.segments import Template, join
from anima.errors import ModelError
from anima.model.compute import Compute
from anima.model.lora import AdaptedModel, adapter_on_host, check_adapter_files, save_adapter

RECORD = "anima.json"
PROBE = Conversation(
    (
        Message("user", "One? 一"),
        Message("assistant", "Two. 二"),
        Message("user", "Three? 三"),
        Message("assistant", "Four. 四"),
    ),
    source="template probe",
)
PROBE_SINGLE = Conversation(PROBE.messages[:2], source="template probe")


@dataclass(frozen=True)
class AdapterRecord:
    """How an adapter was trained, as far as its users must know."""

    model_name_or_path: str
    base_fingerprint: str
    quantization: str
    chat_template: str
    rendering: str
    objective: str
    reference: str = ""
    """For preference training: identity of the model that the policy was compared with."""
    compute: str = ""
    """`Compute.form` of the training: where fingerprints can be compared."""


def rendering_of(template: Template) -> str:
    """The fixed conversation in this template: two exchanges, or one where it knows no more."""
    return join(template.segments(PROBE_SINGLE if template.name == "plain" else PROBE))


def write_record(folder: Path, record: AdapterRecord) -> None:
    """Write anima.json into an adapter's folder."""
    (folder / RECORD).write_text(json.dumps(vars(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def writer(adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, record: AdapterRecord) -> Callable[[Path], None]:
    """Copy the adapter as it is now; what is returned writes it in PEFT's form, tokenizer and record beside it."""
    tensors = adapter_on_host(adapted)

    def write(folder: Path) -> None:
        save_adapter(adapted, folder, tensors)
        tokenizer.save_pretrained(str(folder))
        write_record(folder, record)

    return write


def read_record(folder: Path) -> AdapterRecord:
    """Read anima.json.

    Raises:
        ModelError: the folder is no adapter of ours.
    """
    path = folder / RECORD
    try:
        values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = AdapterRecord.__dataclass_fields__
        return AdapterRecord(**{name: str(value) for name, value in values.items() if name in known})
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ModelError(
            "the folder does not say how its adapter was trained",
            where=path,
            got=_found_instead(folder) or f"{type(error).__name__}: {error}",
            allowed="the adapter/ folder of a run, or one of its checkpoints",
            fix=f"{folder / 'adapter'} is one" if (folder / "adapter" / RECORD).is_file() else "point to such a folder",
        ) from error


def _found_instead(folder: Path) -> str:
    """What lies where an adapter with its record should; empty if both are there."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "there is no such folder"
    return "" if (folder / RECORD).exists() else f"no {RECORD} in this folder"


def read_adapter_record(folder: Path) -> AdapterRecord:
    """`read_record` of a folder that an adapter can be loaded from.

    Raises:
        ModelError: the folder is no adapter of ours, or its files are missing or damaged.
    """
    record = read_record(folder)
    check_adapter_files(folder, str(folder))
    return record


def has_record(model_name_or_path: str | None) -> bool:
    """Whether a model's folder is a merge of ours, which says in which template it was trained."""
    return model_name_or_path is not None and (expanded(model_name_or_path) / RECORD).is_file()


def check_template(record: AdapterRecord, template: Template, folder: Path) -> None:
    """Refuse a template that renders otherwise than the adapter's training did.

    Raises:
        ModelError: see above.
    """
    now = rendering_of(template)
    if now != record.rendering:
        raise ModelError(
            "the chat template differs from the one this adapter was trained with",
            where=folder / RECORD,
            got=repr(now),
            allowed=repr(record.rendering),
            fix=(
                "use the tokenizer files that lie in the adapter's folder"
                if template.name == record.chat_template
                else f"--chat_template {record.chat_template}, that of its training; or --allow_mismatch True"
            ),
        )


def check_base(record: AdapterRecord, fingerprint: str, compute: Compute, folder: Path) -> None:
    """Refuse a base that the adapter was not trained on, where that can be known: fingerprints of another device or
    number format differ by themselves.

    Raises:
        ModelError: see above.
    """
    if record.compute == compute.form and record.base_fingerprint != fingerprint:
        raise ModelError(
            "the adapter was trained on another base",
            where=folder / RECORD,
            got=f"base fingerprint {fingerprint}",
            allowed=f"{record.base_fingerprint}, that of {record.model_name_or_path}",
            fix="--model_name_or_path with the base of its training; or --allow_mismatch True",
        )
