"""Messages rendered as training did, encoded, answered. Knows one model and no history."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer, TextStreamer

from anima.data.encode import Encoder
from anima.data.records import Message
from anima.data.templates import Template
from anima.inference.generate import GREEDY, Sampling, generate_answers
from anima.inference.stops import stop_ids
from anima.model.packed import generating


class Answerer:
    """Renders messages as training did and lets a model answer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        """Bind a model to its tokenizer and template."""
        self._model = model
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = Encoder(tokenizer)
        self._stops = stop_ids(template, self._encoder)

    @property
    def template(self) -> Template:
        """How this speaker renders."""
        return self._template

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What it reads with."""
        return self._tokenizer

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """Answers to conversations that end in a user turn, in one batch."""
        prompts = [self._encoder.prompt_ids(self._template.prompt_segments(messages)) for messages in conversations]
        with generating(self._model):
            return generate_answers(
                self._model,
                self._tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                stop_ids=self._stops,
                sampling=sampling,
                streamer=streamer,
            )

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        write: Callable[[str], None],
        sampling: Sampling = GREEDY,
    ) -> str:
        """Answer one conversation and hand on the text as it comes. Ctrl-C ends the answer and keeps what there is."""
        streamer = _Pieces(self._tokenizer, write)
        try:
            return self.answer([messages], max_new_tokens=max_new_tokens, sampling=sampling, streamer=streamer)[0]
        except KeyboardInterrupt:
            return streamer.text.strip()


class _Pieces(TextStreamer):
    """Whole words of an answer as they come, without the prompt."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with every piece."""
        self.text += text
        if text:
            self._write(text)
