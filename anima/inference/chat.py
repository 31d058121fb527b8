"""A conversation with base and adapter: history, rendering, answer. Knows no terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer, TextStreamer

from anima.config.schema import ChatTemplate, ModelConfig
from anima.data.encode import Encoder
from anima.data.records import Message
from anima.data.templates import Template, make_template
from anima.inference.adapter_folder import check_template, read_record
from anima.inference.generate import generate_answers
from anima.model.base_model import load_base
from anima.model.compute import choose_compute
from anima.model.lora import load_for_inference
from anima.model.packed import generating
from anima.model.tokenizer import load_tokenizer


class Answerer:
    """Renders messages as training did and lets a model answer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        """Bind a model to its tokenizer and template."""
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = Encoder(tokenizer)

    def answer(
        self, conversations: Sequence[Sequence[Message]], *, max_new_tokens: int, streamer: BaseStreamer | None = None
    ) -> list[str]:
        """Greedy answers to conversations that end in a user turn, in one batch."""
        prompts = [self._encoder.prompt_ids(self._template.prompt_segments(messages)) for messages in conversations]
        with generating(self._model):
            return generate_answers(
                self._model, self._tokenizer, prompts, max_new_tokens=max_new_tokens, streamer=streamer
            )

    def stream(self, messages: Sequence[Message], *, max_new_tokens: int) -> str:
        """Answer one conversation, printing the text as it comes."""
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        return self.answer([messages], max_new_tokens=max_new_tokens, streamer=streamer)[0]


def load_answerer(adapter_dir: str, *, device: str = "auto", model_name_or_path: str | None = None) -> Answerer:
    """The base of an adapter with the adapter on it, and the template it was trained with.

    Args:
        adapter_dir: The adapter/ folder of a run.
        device: auto, cuda or cpu.
        model_name_or_path: Where the base lies now; None for where training found it.

    Raises:
        ModelError: missing files, an adapter of another shape, another template.
    """
    folder = Path(adapter_dir).expanduser()
    record = read_record(folder)
    base_name = model_name_or_path or record.model_name_or_path
    quantization: Literal["nf4", "none"] = "nf4" if record.quantization == "nf4" else "none"
    config = ModelConfig(model_name_or_path=base_name, quantization=quantization)
    tokenizer = load_tokenizer(config, folder=folder)
    name: ChatTemplate = record.chat_template  # type: ignore[assignment]
    template = make_template(name, tokenizer)
    check_template(record, template, folder)
    base = load_base(config, choose_compute(device, "auto", 0))
    return Answerer(load_for_inference(base, folder), tokenizer, template)


def load_base_answerer(
    model_name_or_path: str,
    *,
    device: str = "auto",
    quantization: Literal["nf4", "none"] = "nf4",
    chat_template: ChatTemplate = "auto",
) -> Answerer:
    """A model without an adapter, in the template that training would choose for it.

    Args:
        model_name_or_path: Its folder or hub name.
        device: auto, cuda or cpu.
        quantization: As in training, so that an adapter and its base differ in nothing else.
        chat_template: A value of --chat_template.

    Raises:
        ModelError: missing files, or no model that we can run.
    """
    config = ModelConfig(model_name_or_path=model_name_or_path, quantization=quantization)
    tokenizer = load_tokenizer(config)
    template = make_template(chat_template, tokenizer, mask_answers=False)
    return Answerer(load_base(config, choose_compute(device, "auto", 0)), tokenizer, template)
