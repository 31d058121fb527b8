"""Adapters of ours merged into their base: what must agree, what is compared, and the folder that comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from anima.config.paths import expanded
from anima.config.schema import ChatTemplate, ModelConfig
from anima.data.encode import Encoder
from anima.data.records import Conversation, Message
from anima.data.segments import Template
from anima.data.templates import make_template
from anima.errors import ModelError
from anima.inference.adapter_folder import AdapterRecord, check_template, read_record
from anima.inference.merged_folder import MergeRequest, Prepared, write_companions
from anima.model.compute import Compute
from anima.model.merge import NAMES, Drift, Folding, Into, fold
from anima.model.new_folder import check_new, new_folder
from anima.model.prequantize import source_of
from anima.model.stored_adapter import read_adapter
from anima.model.stored_base import StoredBase, open_base
from anima.model.tokenizer import load_tokenizer
from anima.model.weights import ShardWriter

COMPARED = (
    ("What is the capital of France?", "The capital of France is Paris, a city on the Seine."),
    ("Why is the sky blue?", "Sunlight is scattered by the air, and blue light is scattered most."),
    ("List three prime numbers.", "1. Two\n2. Three\n3. Five"),
    ("Write a function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("What is 17 times 23?", "17 * 23 = 391."),
    ("如何更好地融入新工作圈子？", "多倾听，多交流，主动帮助同事，慢慢就会熟悉起来。"),
    ("什么是机器学习？", "机器学习是让计算机从数据中学习规律的方法。"),
    ("Tell me a very short story.", "The lamp went out. The keeper climbed the stairs, and the ships came home."),
)
"""Fixed conversations whose logits are compared, at every position."""


def prepare_merge(request: MergeRequest, compute: Compute) -> Prepared:
    """Check all that can be checked before the work.

    Raises:
        ModelError: an adapter of another base, shape, template or order; missing files; a folder in the way.
    """
    if request.output_dir is not None:
        check_new(expanded(request.output_dir, "--output_dir"))
    folders = [expanded(adapter) for adapter in request.adapters]
    records = tuple(read_record(folder) for folder in folders)
    tokenizer, template = _agreed_template(request, records, folders)
    base = open_base(
        request.model_name_or_path or records[0].model_name_or_path, trust_remote_code=request.trust_remote_code
    )
    adapters = tuple(read_adapter(folder, base) for folder in folders)
    nf4 = records[0].quantization == "nf4"
    into: Into = request.into if nf4 else "original"
    original = _original(request, base, nf4)
    if into == "original" and original is None:
        raise ModelError(
            "the base is stored in NF4 and its 16-bit original is not where it was",
            where="--into original",
            got=source_of(base.folder) or "the folder does not say where it came from",
            fix="--original with the folder of the 16-bit model",
        )
    folding = Folding(base, original, adapters, nf4, compute.dtype, request.out_dtype, compute)
    folding, notes = _check_bases(request, records, folding)
    if original is None:
        notes = (*notes, "the 16-bit original is not at hand: the merge into it is not compared (--original)")
    return Prepared(replace(request, into=into), records, folding, tokenizer, template, notes)


def _agreed_template(
    request: MergeRequest, records: Sequence[AdapterRecord], folders: Sequence[Path]
) -> tuple[PreTrainedTokenizerBase, Template]:
    """The last adapter's template, which every adapter must have been trained in."""
    config = ModelConfig(model_name_or_path=str(folders[-1]), trust_remote_code=request.trust_remote_code)
    tokenizer = load_tokenizer(config, folder=folders[-1])
    name: ChatTemplate = records[-1].chat_template  # type: ignore[assignment]
    template = make_template(name, tokenizer, mask_answers=False)
    for record, folder in zip(records, folders, strict=True):
        if not request.allow_mismatch:
            check_template(record, template, folder)
    return tokenizer, template


def _original(request: MergeRequest, base: StoredBase, nf4: bool) -> StoredBase | None:
    """The 16-bit model: named, or the base itself, or where the NF4 folder came from if that is still there."""
    if request.original is not None:
        found = open_base(request.original, trust_remote_code=request.trust_remote_code)
    elif not base.is_nf4:
        return base
    else:
        source = source_of(base.folder)
        if source is None or not Path(source).is_dir():
            return None
        found = open_base(source, trust_remote_code=request.trust_remote_code)
    if found.is_nf4 or found.shapes != base.shapes:
        raise ModelError(
            "this is not the 16-bit original of the base",
            where=f"--original {found.folder}",
            got="a model in NF4" if found.is_nf4 else "other layers or shapes",
            fix="name the model that was quantised",
        )
    return found


def _check_bases(
    request: MergeRequest, records: Sequence[AdapterRecord], folding: Folding
) -> tuple[Folding, tuple[str, ...]]:
    """Every adapter was trained on what it is now put on; finds the number format of that training."""
    found = {}
    for dtype in dict.fromkeys((folding.compute.dtype, torch.bfloat16, torch.float32)):
        candidate = replace(folding, trained_dtype=dtype)
        found[candidate.fingerprint(0)] = candidate
    chosen = found.get(records[0].base_fingerprint)
    problems = []
    if chosen is None:
        chosen = folding
        problems.append(_other_base(records[0], request.adapters[0], folding, folding.fingerprint(0)))
    if folding.original is not None and folding.original is not folding.base:
        quantized = folding.original.fingerprint(chosen.trained_dtype, folding.compute.device, nf4=folding.nf4)
        if quantized != chosen.fingerprint(0):
            problems.append(_not_the_original(folding, chosen.fingerprint(0), quantized))
    for number, record in enumerate(records[1:], start=1):
        expected = chosen.fingerprint(number)
        if record.base_fingerprint != expected:
            problems.append(_wrong_order(records, request.adapters, number, expected))
    if problems and not request.allow_mismatch:
        raise problems[0]
    return chosen, tuple(f"told to go on: {problem.what} ({problem.got})" for problem in problems)


def _other_base(record: AdapterRecord, adapter: str, folding: Folding, found: str) -> ModelError:
    here = f"{folding.compute.device.type} {str(folding.compute.dtype).removeprefix('torch.')}"
    hint = "--model_name_or_path with the base of its training"
    if record.compute and record.compute.split()[0] != folding.compute.device.type and not folding.base.is_nf4:
        hint += f"; quantised bits differ between devices: --device {record.compute.split()[0]}, or the NF4 folder"
    return ModelError(
        "the adapter was trained on another base",
        where=f"--adapter {adapter}: anima.json",
        got=f"base fingerprint {found} on {here}, for {folding.base.folder}",
        allowed=f"{record.base_fingerprint}{f' on {record.compute}' if record.compute else ''}, for "
        f"{record.model_name_or_path}",
        fix=f"{hint}; or --allow_mismatch True",
    )


def _not_the_original(folding: Folding, expected: str, quantized: str) -> ModelError:
    assert folding.original is not None
    return ModelError(
        "the 16-bit model is not the one that the base comes from",
        where=f"--original {folding.original.folder}",
        got=f"fingerprint {quantized}",
        allowed=f"{expected}, that of {folding.base.folder}",
        fix="name the model that was quantised; on another device than then its bits may differ: --allow_mismatch True"
        if folding.base.is_nf4
        else "leave --original out: the base is in 16 bit itself",
    )


def _wrong_order(records: Sequence[AdapterRecord], adapters: Sequence[str], number: int, expected: str) -> ModelError:
    same = records[number].base_fingerprint == records[0].base_fingerprint
    return ModelError(
        "the adapter was not trained on the merge of those before it"
        + (": it was trained on the same base as the first" if same else ""),
        where=f"--adapter {adapters[number]}: anima.json",
        got=f"base fingerprint {records[number].base_fingerprint}",
        allowed=f"{expected}: {' + '.join(adapters[:number])} merged",
        fix=f"a run with --adapter_path goes on from an adapter and holds it: --adapter {adapters[number]} alone"
        if same
        else "check the order; or --allow_mismatch True",
    )


def run_merge(prepared: Prepared, on_bytes: Callable[[int, int], None]) -> dict[str, Drift]:
    """Compare, and write the folder unless the merge drifts too far; without an output folder only compare.

    Raises:
        ModelError: drift past `max_drift`, or no room.
    """
    request, folding = prepared.request, prepared.folding
    encoder = Encoder(prepared.tokenizer)
    rows = [_ids(encoder, prepared.template, question, answer) for question, answer in COMPARED]
    if request.output_dir is None:
        return fold(folding, request.into, rows, writer=None, on_bytes=on_bytes)
    need = folding.expected_bytes + (64 << 20)
    with new_folder(expanded(request.output_dir, "--output_dir"), need_bytes=need) as folder:
        writer = ShardWriter(folder, request.shard_bytes)
        drifts = fold(folding, request.into, rows, writer=writer, on_bytes=on_bytes)
        writer.finish()
        _check_drift(request, drifts)
        write_companions(prepared, folder, encoder, drifts)
        open_base(str(folder), trust_remote_code=request.trust_remote_code)  # every tensor is there in its shape
    return drifts


def _ids(encoder: Encoder, template: Template, question: str, answer: str) -> list[int]:
    conversation = Conversation((Message("user", question), Message("assistant", answer)), source="merge probe")
    return [i for run in encoder.encode([template.segments(conversation)])[0] for i in run.ids]


def _check_drift(request: MergeRequest, drifts: dict[str, Drift]) -> None:
    drift = drifts[NAMES[request.into]]
    if not drift.mean <= request.max_drift and not request.allow_drift:  # also where it is no number
        raise ModelError(
            "the merged model is not the one that was trained: its logits drift too far",
            where=f"--into {request.into}",
            got=f"mean {drift.mean:.4f}, largest {drift.largest:.3f}",
            allowed=f"a mean of {request.max_drift:g} (--max_drift)",
            fix="--into nf4 folds into the base as trained" if request.into == "original" else "--allow_drift True",
        )
