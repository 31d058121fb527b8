"""What holds for every template: it is chosen by name, and a prompt is exactly the text before its answer."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anima.data.encode import Encoder
from anima.data.records import Conversation, Message
from anima.data.templates import join, make_template, rendered
from anima.errors import DataError

TEXT = st.text(st.sampled_from("ab \n<|>[]ims_endART:#é你"), max_size=12)
ANSWERS = TEXT.filter(lambda text: bool(text.strip()))


@st.composite
def conversations(draw: st.DrawFn, one_exchange: bool) -> Conversation:
    """Any conversation that the rules allow."""
    messages = []
    if not one_exchange and draw(st.booleans()):
        messages.append(Message("system", draw(TEXT)))
    for _ in range(1 if one_exchange else draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXT), draw(st.sampled_from(["", "ctx", "c\n d"]))))
        messages.append(Message("assistant", draw(ANSWERS)))
    return Conversation(tuple(messages), "f:1")


@pytest.mark.parametrize("name", ["model", "alpaca", "vicuna", "guanaco", "plain"])
def test_a_prompt_is_the_text_before_its_answer(name: Any, byte_tokenizer: Any) -> None:
    template = make_template(name, byte_tokenizer())
    encoder = Encoder(byte_tokenizer())

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(conversations(one_exchange=name == "plain"))
    def check(conversation: Conversation) -> None:
        segments = template.segments(conversation)
        assert join(segments) == rendered(template, conversation)
        runs = encoder.encode([segments])[0]
        seen = 0
        for i, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            prompt = template.prompt_segments(conversation.messages[:i])
            assert join(prompt) == template.prompt(conversation.messages[:i])
            answer = [j for j, run in enumerate(runs) if run.trainable][seen]
            seen += 1
            # Byte for byte and id for id what training puts before this answer.
            before = [i for run in runs[:answer] for i in run.ids]
            assert encoder.prompt_ids(prompt) == before
            assert join(segments).startswith(join(prompt))
            assert message.content in "".join(s.text for s in segments if s.trainable)
        assert seen == sum(run.trainable for run in runs)

    check()


def test_auto_is_the_model_s_template_or_alpaca(byte_tokenizer: Any) -> None:
    assert make_template("auto", byte_tokenizer()).name == "model"
    assert make_template("auto", byte_tokenizer(None)).name == "alpaca"
    with pytest.raises(DataError, match="no chat template"):
        make_template("model", byte_tokenizer(None))


def test_the_real_template_of_the_small_model(smol_tokenizer: Any) -> None:
    template = make_template("auto", smol_tokenizer)
    conversation = Conversation((Message("user", "Hi"), Message("assistant", "Hello!")), "f:1")
    assert rendered(template, conversation) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    learned = "".join(s.text for s in template.segments(conversation) if s.trainable)
    assert learned == "Hello!<|im_end|>"
