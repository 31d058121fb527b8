"""The model's own chat template (Jinja, run by the tokenizer), cut into learned and given text by prefix rendering.

Before answer i stands render(messages[:i], generation prompt), which must be the start of the whole rendering; from
there on the model speaks, up to the first special token after the answer's text.
"""

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

from jinja2 import TemplateError

from anima.data.records import Conversation, Message
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

    Raises:
        DataError: The tokenizer has no chat template.
        ModelError: The tokenizer has no EOS token.
    """

    name = "model"

    def __init__(self, tokenizer: Tokenizer, *, mask_answers: bool = True) -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer brings no chat template",
                where="--chat_template",
                got="model",
                allowed="auto, alpaca, vicuna, guanaco, plain",
                fix="use --chat_template auto, which is alpaca here",
            )
        self._tokenizer = tokenizer
        self._mask_answers = mask_answers
        self._eos = eos_token(tokenizer)
        spellings = sorted({*special_tokens(tokenizer), self._eos}, key=len, reverse=True)
        self._stop = re.compile("|".join(map(re.escape, spellings)))
        self._scaffolds: dict[tuple[str, ...], Sequence[list[str] | None]] = {}

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
        return self._cut(conversation.messages, conversation.source)

    def prompt_segments(self, messages: Sequence[Message]) -> list[Segment]:
        """What stands before the answer to `messages`, which end in a user turn.

        Raises:
            DataError: As for `segments`.
        """
        return self._cut(messages, "prompt")

    def prompt(self, messages: Sequence[Message]) -> str:
        """`prompt_segments` as text."""
        return join(self.prompt_segments(messages))

    def _render(self, messages: Sequence[Message], source: str, *, prompt: bool) -> str:
        plain = [{"role": m.role, "content": m.text} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
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

    def _spans(self, messages: Sequence[Message], source: str) -> tuple[list[str], list[list[Message]]]:
        """The text and the messages of each span; one that opens with an answer starts where its prompt ends."""
        groups = self._groups(messages)
        ends = list(accumulate(len(group) for group in groups))
        borders = ["", *(self._render(messages[:end], source, prompt=True) for end in ends[:-1])]
        borders.append(self._render(messages, source, prompt=messages[-1].role != "assistant"))
        broken = next((pair for pair in pairwise(borders) if not _goes_on(*pair)), None)
        if broken is None:
            return [longer[len(shorter) :] for shorter, longer in pairwise(borders)], groups
        if not self._mask_answers and messages[-1].role == "assistant":
            return borders[-1:], [list(messages)]
        raise DataError(
            "the model's chat template cannot be masked safely: a prompt is not the start of its conversation",
            where=source,
            got=f"...{broken[0][-40:]!r}, where the longer text does not go on like that",
            allowed="a template that only appends",
            fix=f"{_OTHER_TEMPLATE}, or --train_on all",
        )

    def _cut(self, messages: Sequence[Message], source: str) -> list[Segment]:
        spans, groups = self._spans(messages, source)
        scaffolds = self._scaffold(messages)
        if len(scaffolds) != len(spans):
            scaffolds = [None] * len(spans)
        segments: list[Segment] = []
        for i, (span, group) in enumerate(zip(spans, groups, strict=True)):
            texts = _locate(span, [message.text for message in group], scaffolds[i])
            if texts is None:
                raise DataError(
                    "the model's chat template changes the text of a message, so it cannot be told what is learned",
                    where=source,
                    got=f"rendered as {span[:80]!r}",
                    fix=_OTHER_TEMPLATE,
                )
            if i > 0:
                segments += self._answer(*texts[:3], last=len(group) == 1, source=source)
                segments += _given(["", *texts[3:]], group[1:])
            else:
                segments += _given(texts, group)
        return segments

    def _scaffold(self, messages: Sequence[Message]) -> Sequence[list[str] | None]:
        """The template's own text around each message of each span, from a rendering of marks in place of texts.

        Empty where the template treats the marks otherwise than it treats text; the texts are then searched for.
        """
        roles = tuple(message.role for message in messages)
        if roles not in self._scaffolds:
            marked = [Message(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)]
            try:
                spans, groups = self._spans(marked, "template")
            except DataError:
                spans, groups = [], [[]]
            pieces = [re.split("\ue000[0-9]+\ue001", span) for span in spans]
            sizes = [len(group) + 1 for group in groups]
            self._scaffolds[roles] = pieces if [len(p) for p in pieces] == sizes else []
        return self._scaffolds[roles]

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


def _goes_on(shorter: str, longer: str) -> bool:
    return longer.startswith(shorter) and len(longer) > len(shorter)


def _given(texts: Sequence[str], group: Sequence[Message]) -> list[Segment]:
    """Segments of a span that is not learned; `texts` are scaffold, message, scaffold, message, ..., scaffold."""
    segments = [Segment(texts[0], trainable=False)]
    for message, text, scaffold in zip(group, texts[1::2], texts[2::2], strict=True):
        tail = message.context if text.endswith(message.context) else message.context.rstrip()
        if message.role != "user":
            segments.append(Segment(text, trainable=False, literal=True))
        elif tail and text.endswith(tail):
            segments.append(Segment(text[: -len(tail)], trainable=False, literal=True))
            segments.append(Segment(tail, trainable=False, trimmable=True, literal=True))
        else:
            segments.append(Segment(text, trainable=False, trimmable=True, literal=True))
        segments.append(Segment(scaffold, trainable=False))
    return [segment for segment in segments if segment.text]


def _locate(span: str, contents: Sequence[str], scaffold: Sequence[str] | None) -> list[str] | None:
    """The span as scaffold, content, scaffold, ..., scaffold; templates may strip the ends of a content.

    First by the known scaffold; failing that (a template that looks into the text, such as for <think>), each
    content must occur exactly once. None: a content is not there, or it is unclear where.
    """
    found: list[str] = []
    position = 0
    for k, content in enumerate(contents):
        variants = (content, content.strip(), content.lstrip(), content.rstrip())
        for variant in variants:
            if scaffold is not None and span.startswith(scaffold[k] + variant + scaffold[k + 1], position):
                found += [scaffold[k], variant]
                position += len(scaffold[k]) + len(variant)
                break
        else:
            break
    if scaffold is not None and len(found) == 2 * len(contents) and span[position:] == scaffold[-1]:
        return [*found, scaffold[-1]]
    found, position = [], 0
    for content in contents:
        variant = content if content in span else content.strip()
        if not variant or span.count(variant, position) != 1:
            return None
        start = span.index(variant, position)
        found += [span[position:start], variant]
        position = start + len(variant)
    return [*found, span[position:]]
