"""A base and its adapters as speakers: each renders as its training did, and answers. Knows no terminal."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from anima.config.paths import expanded
from anima.config.schema import ChatTemplate, ModelConfig
from anima.data.records import Message
from anima.data.templates import Template, make_template
from anima.errors import ModelError
from anima.inference.adapter_folder import (
    RECORD,
    AdapterRecord,
    check_base,
    check_template,
    has_record,
    read_adapter_record,
    read_record,
)
from anima.inference.answering import Answerer
from anima.inference.generate import GREEDY, Sampling
from anima.model.adapters import Adapters
from anima.model.base_model import load_base
from anima.model.compute import Compute, choose_compute
from anima.model.nf4 import fingerprint, hold_dense
from anima.model.tokenizer import load_tokenizer

BASE = "base"
"""Name of the speaker without an adapter."""
NAME = re.compile(r"\w[\w.-]*")
"""A speaker's name: typed behind /switch, and the name of its file of answers."""
Quantization = Literal["nf4", "none"]


@dataclass(frozen=True)
class SpeakerSettings:
    """Who shall speak, and where it is.

    Attributes:
        adapters: Adapter folders by the names of their speakers.
        model_name_or_path: The base, or a merged model; None for the one that the adapters name.
        device: auto, cuda or cpu.
        quantization: Of a base without adapters: auto is none for a merged folder, else nf4. An adapter's is that of
            its training.
        chat_template: Another template than the training's; needs `allow_mismatch` where there is an adapter.
        allow_mismatch: Go on with another base or template than those of the training.
    """

    adapters: Mapping[str, Path]
    model_name_or_path: str | None = None
    device: str = "auto"
    quantization: Literal["auto", "nf4", "none"] = "auto"
    chat_template: ChatTemplate | None = None
    allow_mismatch: bool = False


class Speakers:
    """One base in memory and the adapters that speak through it."""

    def __init__(
        self,
        adapters: Adapters,
        answerers: Mapping[str, Answerer],
        places: Mapping[str, str],
        quantization: Quantization,
    ) -> None:
        """`answerers` and where they lie by name, `BASE` among them; `quantization` of the base under all of them."""
        self.quantization = quantization
        self._places = dict(places)
        self._adapters = adapters
        self._answerers = dict(answerers)

    def answerer(self, name: str) -> Answerer:
        """One speaker alone; right as long as no other one speaks."""
        return self._answerers[name]

    def identity(self, name: str) -> str:
        """Folder or hub name of a speaker."""
        return self._places[name]

    @contextmanager
    def network(self, name: str) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
        """The model as one speaker, with its tokenizer."""
        with self._adapters.speaking(None if name == BASE else name) as model:
            yield model, self._answerers[name].tokenizer

    @property
    def names(self) -> tuple[str, ...]:
        """The base first."""
        return tuple(self._answerers)

    def template(self, name: str) -> Template:
        """How a speaker renders."""
        return self._answerers[name].template

    def answer(
        self,
        name: str,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> list[str]:
        """One speaker's answers to conversations that end in a user turn, in one batch."""
        with self._adapters.speaking(None if name == BASE else name):
            return self._answerers[name].answer(conversations, max_new_tokens=max_new_tokens, sampling=sampling)

    def stream(
        self,
        name: str,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        write: Callable[[str], None],
        sampling: Sampling = GREEDY,
    ) -> str:
        """One speaker's answer to one conversation, handed on as it comes."""
        with self._adapters.speaking(None if name == BASE else name):
            return self._answerers[name].stream(messages, max_new_tokens=max_new_tokens, write=write, sampling=sampling)


def named_adapters(specs: Sequence[str]) -> dict[str, Path]:
    """Adapter folders by speaker: NAME=FOLDER, or named by the objective of their training (sft, dpo, sft-2).

    Raises:
        ModelError: a folder is no adapter of ours, or a name is no name, given twice or taken by the base.
    """
    found: dict[str, Path] = {}
    for spec in specs:
        name, equals, path = spec.partition("=")
        if expanded(spec, "--adapter").is_dir():  # folders may have such a sign in their names: runs/lr=0.1/adapter
            equals, path = "", spec
        folder = expanded(path if equals else spec, "--adapter")
        if equals and name and not NAME.fullmatch(name):
            raise ModelError(
                "this is neither an adapter's folder nor a name for one",
                where="--adapter",
                got=spec,
                allowed="FOLDER, or NAME=FOLDER with letters, digits and . _ - in the name",
            )
        if not equals:
            kind = read_record(folder).objective
            name = kind
            while name in found:
                name = f"{kind}-{int(name.removeprefix(kind).lstrip('-') or 1) + 1}"
        if name in found or name in ("", BASE, "all"):
            raise ModelError(
                "a speaker's name is taken", where="--adapter", got=spec, allowed="NAME=FOLDER with names of their own"
            )
        found[name] = folder
    return found


def load_speakers(settings: SpeakerSettings) -> Speakers:
    """Load the base once and all adapters beside it.

    Raises:
        ModelError: missing files, adapters of several bases, another base or template than that of the training.
    """
    records = {name: read_adapter_record(folder) for name, folder in settings.adapters.items()}
    config = _base_config(settings, records)
    compute = choose_compute(settings.device, "auto", 0)
    told: dict[str, tuple[PreTrainedTokenizerBase, Template]] = {}
    for name, folder in settings.adapters.items():
        tokenizer = load_tokenizer(config, folder=folder)
        template = make_template(_template_name(settings, records[name]), tokenizer, mask_answers=False)
        if not settings.allow_mismatch:
            check_template(records[name], template, folder)
        told[name] = (tokenizer, template)
    told = {BASE: _base_voice(settings, config), **told}
    base = load_base(config, compute)
    _check_bases(settings, records, base, compute)
    if compute.device.type == "cpu":
        hold_dense(base)
    adapters = Adapters(base, settings.adapters)
    places = {BASE: config.model_name_or_path, **{name: str(folder) for name, folder in settings.adapters.items()}}
    answerers = {name: Answerer(adapters.model, *voice) for name, voice in told.items()}
    return Speakers(adapters, answerers, places, config.quantization)


def _template_name(settings: SpeakerSettings, record: AdapterRecord) -> ChatTemplate:
    return settings.chat_template or record.chat_template  # type: ignore[return-value]


def _base_config(settings: SpeakerSettings, records: Mapping[str, AdapterRecord]) -> ModelConfig:
    bases = {(record.model_name_or_path, record.quantization) for record in records.values()}
    if len(bases) > 1:
        raise ModelError(
            "these adapters do not share a base, and one is held in memory",
            where="--adapter",
            got=", ".join(sorted(f"{path} in {form}" for path, form in bases)),
            fix="talk to them one after the other, or compare them with launch/arena.py",
        )
    if not bases:
        if settings.model_name_or_path is None:
            raise ModelError("nobody to talk to", where="--adapter or --model_name_or_path", fix="--adapter FOLDER")
        wanted = settings.quantization
        if wanted == "auto":
            wanted = "none" if has_record(settings.model_name_or_path) else "nf4"
        return ModelConfig(model_name_or_path=settings.model_name_or_path, quantization=wanted)
    ((path, form),) = bases
    quantization: Quantization = "nf4" if form == "nf4" else "none"
    if settings.quantization not in ("auto", quantization):
        raise ModelError(
            "adapters run on their base as it was in their training",
            where="--quantization",
            got=settings.quantization,
            allowed=f"auto or {quantization}",
        )
    return ModelConfig(model_name_or_path=settings.model_name_or_path or path, quantization=quantization)


def _base_voice(settings: SpeakerSettings, config: ModelConfig) -> tuple[PreTrainedTokenizerBase, Template]:
    """A base speaks as training would choose for it; a merged model as its record says."""
    tokenizer = load_tokenizer(config)
    folder = expanded(config.model_name_or_path)
    if (folder / RECORD).is_file():
        record = read_record(folder)
        template = make_template(_template_name(settings, record), tokenizer, mask_answers=False)
        if not settings.allow_mismatch:
            check_template(record, template, folder)
        return tokenizer, template
    return tokenizer, make_template(settings.chat_template or "auto", tokenizer, mask_answers=False)


def _check_bases(
    settings: SpeakerSettings, records: Mapping[str, AdapterRecord], base: PreTrainedModel, compute: Compute
) -> None:
    if records and not settings.allow_mismatch:
        found = fingerprint(base)
        for name, record in records.items():
            check_base(record, found, compute, settings.adapters[name])


def load_answerer(adapter_dir: str, *, device: str = "auto", model_name_or_path: str | None = None) -> Answerer:
    """The base of one adapter with the adapter on it, and the template it was trained with.

    Args:
        adapter_dir: The adapter/ folder of a run.
        device: auto, cuda or cpu.
        model_name_or_path: Where the base lies now; None for where training found it.

    Raises:
        ModelError: as `load_speakers`.
    """
    folder = expanded(adapter_dir)
    speakers = load_speakers(SpeakerSettings({"adapter": folder}, model_name_or_path, device))
    return speakers.answerer("adapter")


def load_base_answerer(
    model_name_or_path: str,
    *,
    device: str = "auto",
    quantization: Quantization = "nf4",
    chat_template: ChatTemplate | None = None,
) -> Answerer:
    """A model without an adapter, in its record's template or the one that training would choose for it.

    Args:
        model_name_or_path: Its folder or hub name.
        device: auto, cuda or cpu.
        quantization: As in training, so that an adapter and its base differ in nothing else.
        chat_template: A value of --chat_template.

    Raises:
        ModelError: missing files, or no model that we can run.
    """
    settings = SpeakerSettings({}, model_name_or_path, device, quantization, chat_template)
    return load_speakers(settings).answerer(BASE)
