"""A chat template's text and the messages within it: what the template is given, and where each message is found.

Knows no tokenizer and no template.
"""

import json
from collections.abc import Sequence
from typing import Any

from anima.data.records import Message
from anima.data.segments import Segment


def as_dict(message: Message) -> dict[str, Any]:
    """The message as templates know it."""
    plain: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.tool_calls:
        plain["tool_calls"] = json.loads(message.tool_calls)
    if message.tool_name:
        plain["name"] = message.tool_name
    if message.tool_call_id:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def goes_on(shorter: str, longer: str) -> bool:
    """Whether the longer text begins with the shorter one and says more."""
    return longer.startswith(shorter) and len(longer) > len(shorter)


def given(texts: Sequence[str], group: Sequence[Message]) -> list[Segment]:
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


def is_call_only(message: Message) -> bool:
    """Whether an answer calls tools and says nothing: its place in the text cannot be marked."""
    return bool(message.tool_calls) and not message.text


def locate(span: str, group: Sequence[Message], scaffold: Sequence[str] | None) -> list[str] | None:
    """The span as scaffold, content, scaffold, ..., scaffold; templates may strip the ends of a content.

    An answer that only calls tools has an empty content behind an empty scaffold; its calls begin the next one.

    First by the known scaffold; failing that (a template that looks into the text, such as for <think>), each
    content must occur exactly once. None: a content is not there, or it is unclear where.
    """
    texts = _locate([message.text for message in group if not is_call_only(message)], span, scaffold)
    if texts is None:
        return None
    rest = iter(texts)
    pairs = [("", "") if is_call_only(message) else (next(rest), next(rest)) for message in group]
    return [*(text for pair in pairs for text in pair), *rest]


def _locate(contents: Sequence[str], span: str, scaffold: Sequence[str] | None) -> list[str] | None:
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
