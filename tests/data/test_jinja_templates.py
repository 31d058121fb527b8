"""Jinja for servers renders what training rendered."""

from typing import Any

import pytest

from anima.data.jinja_templates import jinja_of
from anima.data.records import Conversation, Message
from anima.data.segments import join
from anima.data.text_templates import TextTemplate
from anima.data.tokenizer import adds_bos

EXCHANGE = (Message("user", 'A "q" {{ 1 }}\n一'), Message("assistant", "An\\swer 二"))
LATER = (Message("user", "Again?"), Message("assistant", "Again."))
CASES = {"one": EXCHANGE, "two": EXCHANGE + LATER, "system": (Message("system", "Be kind."), *EXCHANGE, *LATER)}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("name", "case"), [*((name, case) for name in ("alpaca", "vicuna", "guanaco") for case in CASES), ("plain", "one")]
)
def test_the_tokenizer_renders_what_the_template_renders(byte_tokenizer: Any, name: str, case: str, bos: bool) -> None:
    tokenizer = byte_tokenizer(None, adds_bos=bos)
    assert adds_bos(tokenizer) is bos
    template, messages = TextTemplate(name, tokenizer), CASES[case]
    tokenizer.chat_template = jinja_of(name, adds_bos=bos)

    def rendered(part: tuple[Message, ...], prompt: bool) -> str:
        rows = [{"role": message.role, "content": message.content} for message in part]
        return str(tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=prompt))

    assert rendered(messages, False) == join(template.segments(Conversation(messages, "f:1")))
    assert rendered(messages[:-1], True) == template.prompt(messages[:-1])
