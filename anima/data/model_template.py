"""The model's own chat template (Jinja, run by the tokenizer), cut into learned and given text by prefix rendering.

Before answer i stands render(messages[:i], generation prompt), which must be the start of the whole rendering; from
there on the model speaks, up to the first special token after the answer's text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

from jinja2 import TemplateError

from anima.data.records import Conversation, Message
from anima.data.rendering import as_dict, given, goes_on, is_call_only, locate
from anima.data.segments import Segment, join
from anima.data.text_templates import eos_token
from anima.data.tokenizer import Tokenizer, special_tokens
from anima.errors import DataError

_OTHER_TEMPLATE = "use --chat_template alpaca, vicuna or guanaco"


class ModelTemplate:
    """The tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        mask_answers: Whether answers must be told from the rest (--train_on assistant); without, a template that
            rewrites earlier turns is accepted, because every token is learned anyway.
        thinking: Whether answers hold thoughts, for hybrid models such as Qwen 3 whose templates know
            `enable_thinking`. Without, the prompt itself closes an empty thought, which is given and not learned.

    Raises:
        DataError: The tokenizer has no chat template.
        ModelError: The tokenizer has no EOS token.
    """

    def __init__(self, tokenizer: Tokenizer, *, mask_answers: bool = True, thinking: bool = False) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer brings no chat template",
                where="--chat_template",
                got="model_thinking" if thinking else "model",
                allowed="auto, alpaca, vicuna, guanaco, plain",
                fix="use --chat_template auto, which is alpaca here",
            )
        self._tokenizer = tokenizer
        self._mask_answers = mask_answers
        self._thinking = thinking
        self._eos = eos_token(tokenizer)
        spellings = sorted({*special_tokens(tokenizer), self._eos}, key=len, reverse=True)
        self._stop = re.compile("|".join(map(re.escape, spellings)))
        self._scaffolds: dict[tuple[str, ...], Sequence[list[str] | None]] = {}

    @property
    def name(self) -> str:
        """The template's name as in --chat_template."""
        return "model_thinking" if self._thinking else "model"

    @property
    def fingerprint(self) -> str:
        """The template and one rendering: the text may depend on more than the template, such as the date."""
        messages = [Message("user", "Q"), Message("assistant", "A")]
        texts = [self._render(messages[: 2 - prompt], "chat template", prompt=prompt) for prompt in (True, False)]
        return repr((self.name, self._mask_answers, self._tokenizer.chat_template, texts))

    def segments(self, conversation: Conversation) -> list[Segment]:
        """The whole conversation; what the template puts after the last stop token is part of it, but not learned.

        Raises:
            DataError: The template refuses the messages, changes their text, or does not build up turn by turn.
        """
        return self._cut(conversation.messages, conversation.source, conversation.tools)

    def prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        """What stands before the answer to `messages`, which end in a user turn.

        Raises:
            DataError: As for `segments`.
        """
        return self._cut(messages, "prompt")

    def prompt(self, messages: Sequence[Message]) -> str:
        """`prompt_segments` as text."""
        return join(self.prompt_segments(messages))

    def _render(
        self, messages: Sequence[Message], source: str, *, prompt: bool, tools: str = "", thinking: bool | None = None
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [as_dict(message) for message in messages],
                tools=json.loads(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=self._thinking if thinking is None else thinking,
            )
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses the conversation: {error}",
                where=source,
                got=", ".join(m.role for m in messages),
                fix=f"leave out what it names, or {_OTHER_TEMPLATE}",
            ) from None
        return str(text)

    def _groups(self, messages: Sequence[Message]) -> list[list[Message]]:
        """The messages of each span: what stands before the first answer, then each answer with what follows it."""
        groups: list[list[Message]] = [[]]
        for i, message in enumerate(messages):
            if message.role == "assistant" and (self._mask_answers or i == len(messages) - 1):
                groups.append([])
            groups[-1].append(message)
        return groups

    def _spans(self, messages: Sequence[Message], source: str, tools: str) -> tuple[list[str], list[list[Message]]]:
        """The text and the messages of each span; one that opens with an answer starts where its prompt ends."""
        groups = self._groups(messages)
        ends = list(accumulate(len(group) for group in groups))
        whole = self._render(messages, source, prompt=messages[-1].role != "assistant", tools=tools)
        borders = [""]
        for number, end in enumerate(ends[:-1], start=2):
            prompt = self._render(messages[:end], source, prompt=True, tools=tools)
            open_end = number == len(ends) and messages[-1].role == "assistant"
            if not open_end and not whole.startswith(prompt):
                # Hybrid templates leave the empty thought out of earlier turns: there the other prompt is the start.
                prompt = self._render(messages[:end], source, prompt=True, tools=tools, thinking=not self._thinking)
            borders.append(prompt)
        borders.append(whole)
        broken = next((pair for pair in pairwise(borders) if not goes_on(*pair)), None)
        if broken is None:
            return [longer[len(shorter) :] for shorter, longer in pairwise(borders)], groups
        if not self._mask_answers and messages[-1].role == "assistant":
            return borders[-1:], [list(messages)]
        raise DataError(
            "the model's chat template cannot be masked safely: a prompt is not the start of its conversation",
            where=source,
            got=f"...{broken[0][-40:]!r}, where the longer text does not go on like that",
            allowed="a template that only appends",
            fix=self._way_out(messages, source, tools, whole),
        )

    def _way_out(self, messages: Sequence[Message], source: str, tools: str, whole: str) -> str:
        """What to type where the prompt before the last answer does not fit."""
        if messages[-1].role == "assistant" and not self._thinking:
            without, with_thought = (
                self._render(messages[:-1], source, prompt=True, tools=tools, thinking=thinking)
                for thinking in (False, True)
            )
            if goes_on(with_thought, whole) and not goes_on(without, whole):
                return "the answers hold thoughts: use --chat_template model_thinking"
        return f"{_OTHER_TEMPLATE}, or --train_on all"

    def _cut(self, messages: Sequence[Message], source: str, tools: str = "") -> list[Segment]:
        self._refuse_control_tokens(messages, source, tools)
        spans, groups = self._spans(messages, source, tools)
        scaffolds = self._scaffold(messages, tools)
        if len(scaffolds) != len(spans):
            scaffolds = [None] * len(spans)
        segments: list[Segment] = []
        for i, (span, group) in enumerate(zip(spans, groups, strict=True)):
            texts = locate(span, group, scaffolds[i])
            if texts is None:
                raise DataError(
                    "the model's chat template changes the text of a message, so it cannot be told what is learned",
                    where=source,
                    got=f"rendered as {span[:80]!r}",
                    fix=_OTHER_TEMPLATE,
                )
            if i > 0:
                if group[0].tool_calls:
                    segments += self._calling_answer(texts[0], texts[1], texts[2], source)
                else:
                    segments += self._answer(*texts[:3], last=len(group) == 1, source=source)
                segments += given(["", *texts[3:]], group[1:])
            else:
                segments += given(texts, group)
        return segments

    def _refuse_control_tokens(self, messages: Sequence[Message], source: str, tools: str) -> None:
        """Tools and calls are written by the template, so a control token within them would be a real one."""
        for text in (tools, *(message.tool_calls for message in messages)):
            found = self._stop.search(text)
            if found is not None:
                raise DataError(
                    "a tool or a call spells out a control token of the tokenizer",
                    where=source,
                    got=found[0],
                    fix="mend or remove this row",
                )

    def _scaffold(self, messages: Sequence[Message], tools: str) -> Sequence[list[str] | None]:
        """The template's own text around each message of each span, from a rendering of marks in place of texts.

        Empty where the template treats the marks otherwise than it treats text; the texts are then searched for.
        """
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            return self._marked(messages, tools)  # these differ from row to row
        roles = tuple(message.role for message in messages)
        if roles not in self._scaffolds:
            self._scaffolds[roles] = self._marked(messages, tools)
        return self._scaffolds[roles]

    def _marked(self, messages: Sequence[Message], tools: str) -> Sequence[list[str] | None]:
        marked = [
            replace(message, content="" if is_call_only(message) else f"\ue000{i}\ue001", context="")
            for i, message in enumerate(messages)
        ]
        try:
            spans, groups = self._spans(marked, "template", tools)
        except DataError:
            spans, groups = [], [[]]
        pieces = [re.split("\ue000[0-9]+\ue001", span) for span in spans]
        sizes = [sum(not is_call_only(message) for message in group) + 1 for group in groups]
        return pieces if [len(p) for p in pieces] == sizes else []

    def _calling_answer(self, before: str, content: str, after: str, source: str) -> list[Segment]:
        """An answer with calls of tools: up to what ends ordinary answers, because calls may begin with a token too."""
        plain = self._cut([Message("user", "Q"), Message("assistant", "A")], source)
        ending = join([segment for segment in plain if segment.trainable]).rpartition("A")[2]
        end = after.find(ending.strip() or ending)
        if end < 0:
            raise DataError(
                "the model's chat template ends calls of tools otherwise than answers, so they cannot be masked safely",
                where=source,
                got=repr(after[:60]),
                allowed=f"a call that ends in {ending!r}",
                fix="use --train_on all, or leave these rows out",
            )
        end += len(ending.strip() or ending)
        said = [Segment(content, trainable=True, literal=True)] if content else []
        segments = [Segment(before, trainable=True), *said, Segment(after[:end], trainable=True)]
        return [segment for segment in [*segments, Segment(after[end:], trainable=False)] if segment.text]

    def _answer(self, before: str, content: str, after: str, *, last: bool, source: str) -> list[Segment]:
        """All that the model has to say: up to the first special token after the content, or to an EOS of our own."""
        stop = self._stop.search(after)
        if stop is not None:
            said, rest = after[: stop.end()], after[stop.end() :]
        elif last:
            said, rest = after + self._eos, ""
        else:
            raise DataError(
                "the model's chat template puts no stop token after an answer in the middle",
                where=source,
                got=repr(after[:60]),
                allowed="a special token of the tokenizer",
                fix=f"{_OTHER_TEMPLATE}, or conversations of one exchange",
            )
        segments = [
            Segment(before, trainable=True),
            Segment(content, trainable=True, literal=True),
            Segment(said, trainable=True),
            Segment(rest, trainable=False),
        ]
        return [segment for segment in segments if segment.text]
