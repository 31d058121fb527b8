"""Answers are told from the rest on templates that behave like those of the well-known model families."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.data.encode import IGNORE_INDEX, Encoder, to_sequence
from anima.data.formats import to_conversation
from anima.data.model_template import ModelTemplate
from anima.data.records import Conversation, Message
from anima.data.segments import join
from anima.errors import DataError

_SPEC = importlib.util.spec_from_file_location("chat_templates", Path(__file__).with_name("chat_templates.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
chat_templates = importlib.util.module_from_spec(_SPEC)
sys.modules["chat_templates"] = chat_templates
_SPEC.loader.exec_module(chat_templates)

TURNS = (Message("user", "Q"), Message("assistant", "A"), Message("user", "R"), Message("assistant", "B"))
THOUGHT = "<think>\nR is near.\n</think>\n\nB"
CALL = {"function": {"name": "sum", "arguments": '{"a": 1, "b": 2}'}, "id": "123456789"}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "name": "sum", "tool_call_id": "123456789"},
        {"role": "assistant", "content": "It is 3.", "tool_calls": None},
    ],
    "tools": [{"type": "function", "function": {"name": "sum", "description": "adds", "parameters": {}}}],
}


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[Any], Any]:
    """One token a byte, and the control tokens of a known template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(known: Any) -> Any:
        names = [*known.special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(names)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(list(known.special))
        if known.bos:  # such tokenizers put their BOS before every text: a template that does so too would double it
            number = names.index(known.bos)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{known.bos} $A", special_tokens=[(known.bos, number)]
            )
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=known.bos or None, eos_token=known.eos)
        fast.chat_template = known.text
        return fast

    return make


def _learned(template: ModelTemplate, tokenizer: Any, conversation: Conversation) -> list[str]:
    """The learned stretches, by way of the labels."""
    runs = Encoder(tokenizer).encode([template.segments(conversation)])[0]
    sequence = to_sequence(runs, train_on_all=False)
    marked = "".join(
        tokenizer.decode([int(i)]) if label != IGNORE_INDEX else "\x00"
        for i, label in zip(sequence.input_ids, sequence.labels, strict=True)
    )
    return [part for part in marked.split("\x00") if part]


@pytest.mark.parametrize("known", chat_templates.KNOWN, ids=lambda known: known.name)
def test_masks_of_the_known_templates(known: Any, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(known)
    template = ModelTemplate(tokenizer)
    conversation = Conversation(TURNS, "f:1")
    assert _learned(template, tokenizer, conversation) == list(known.learned)
    plain = [{"role": m.role, "content": m.content} for m in TURNS]
    text = join(template.segments(conversation))
    assert text == tokenizer.apply_chat_template(plain, tokenize=False)
    assert text.count(known.bos) == known.num_bos or not known.bos
    ids = [i for run in Encoder(tokenizer).encode([template.segments(conversation)])[0] for i in run.ids]
    if known.bos:
        assert ids.count(tokenizer.convert_tokens_to_ids(known.bos)) == known.num_bos
    prompt = template.prompt(TURNS[:3])
    assert text.startswith(prompt)
    prompt_ids = Encoder(tokenizer).prompt_ids(template.prompt_segments(TURNS[:3]))
    assert prompt_ids == ids[: len(prompt_ids)]
    chat = tokenizer.apply_chat_template(plain[:3], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert prompt == chat


@pytest.mark.parametrize("known", chat_templates.KNOWN, ids=lambda known: known.name)
def test_system_messages(known: Any, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(known)
    template = ModelTemplate(tokenizer)
    conversation = Conversation((Message("system", "Short."), *TURNS[:2]), "f:1")
    if not known.system:
        with pytest.raises(DataError, match="System role not supported") as caught:
            template.segments(conversation)
        assert "--chat_template" in str(caught.value.fix)
        return
    assert _learned(template, tokenizer, conversation) == [known.learned[0]]


def test_a_template_that_moves_the_system_text_is_refused_with_a_way_out(tokenizer_of: Any) -> None:
    """Mistral's puts it before the last question, so that earlier turns of the prompt look different."""
    conversation = Conversation((Message("system", "Short."), *TURNS), "f:1")
    with pytest.raises(DataError, match="cannot be masked safely") as caught:
        ModelTemplate(tokenizer_of(chat_templates.MISTRAL)).segments(conversation)
    assert "--chat_template alpaca" in str(caught.value.fix)
    assert "--train_on all" in str(caught.value.fix)


# Thoughts ------------------------------------------------------------------------------------------------------------


def test_an_empty_thought_is_given_and_not_learned(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(chat_templates.QWEN3)
    template = ModelTemplate(tokenizer)
    assert _learned(template, tokenizer, Conversation(TURNS, "f:1")) == ["A<|im_end|>", "B<|im_end|>"]
    assert template.prompt(TURNS[:3]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_thoughts_are_learned_when_the_data_has_them(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(chat_templates.QWEN3)
    thinking = Conversation((*TURNS[:3], Message("assistant", THOUGHT)), "f:1")
    with pytest.raises(DataError, match="cannot be masked safely") as caught:
        ModelTemplate(tokenizer).segments(thinking)
    assert str(caught.value.fix) == "the answers hold thoughts: use --chat_template model_thinking"
    template = ModelTemplate(tokenizer, thinking=True)
    assert (template.name, ModelTemplate(tokenizer).name) == ("model_thinking", "model")
    assert _learned(template, tokenizer, thinking) == ["A<|im_end|>", f"{THOUGHT}<|im_end|>"]
    assert template.prompt(TURNS[:3]).endswith("<|im_start|>assistant\n")
    assert template.fingerprint != ModelTemplate(tokenizer).fingerprint


# Tools ---------------------------------------------------------------------------------------------------------------


def test_calls_are_learned_and_results_are_not(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(chat_templates.QWEN3)
    conversation = to_conversation(TOOL_ROW, "messages", "f:1")
    call = '<tool_call>\n{"arguments": {"a": 1, "b": 2}, "name": "sum"}\n</tool_call><|im_end|>'
    assert _learned(ModelTemplate(tokenizer), tokenizer, conversation) == [call, "It is 3.<|im_end|>"]
    text = join(ModelTemplate(tokenizer).segments(conversation))
    assert '"description": "adds"' in text
    assert "<tool_response>\n3\n</tool_response>" in text


def test_a_call_may_begin_with_a_control_token(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(chat_templates.MISTRAL)
    conversation = to_conversation({"messages": TOOL_ROW["messages"]}, "messages", "f:1")
    learned = _learned(ModelTemplate(tokenizer), tokenizer, conversation)
    assert learned[0].startswith('[TOOL_CALLS] [{"function": {"arguments": {"a": 1, "b": 2}, "name": "sum"}')
    assert learned[0].endswith("}]</s>")
    assert learned[1] == " It is 3.</s>"


def test_calls_with_text_and_without_results(tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of(chat_templates.QWEN3)
    said = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL]}
    conversation = to_conversation({"messages": [TOOL_ROW["messages"][0], said]}, "messages", "f:1")
    learned = _learned(ModelTemplate(tokenizer), tokenizer, conversation)
    assert learned[0].startswith("Let me see.\n<tool_call>\n{")
    assert learned[0].endswith("</tool_call><|im_end|>")


def test_other_templates_refuse_tools_and_say_where_to_go(byte_tokenizer: Any) -> None:
    from anima.data.templates import make_template

    for row in (TOOL_ROW, {"messages": TOOL_ROW["messages"]}):
        with pytest.raises(DataError, match="alpaca template knows no tools") as caught:
            make_template("alpaca", byte_tokenizer()).segments(to_conversation(row, "messages", "f:1"))
        assert "--chat_template model" in str(caught.value.fix)


def test_a_control_token_in_a_call_is_refused(tokenizer_of: Any) -> None:
    call = {"function": {"name": "say", "arguments": {"text": "<|im_end|>"}}}
    row = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(DataError, match="spells out a control token") as caught:
        ModelTemplate(tokenizer_of(chat_templates.QWEN3)).segments(to_conversation(row, "messages", "f:1"))
    assert caught.value.got == "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([{"role": "tool", "content": "3"}], "turn of the user is missing"),
        ([{"role": "user", "content": "Q"}, {"role": "tool", "content": "3"}], "turn of the assistant is missing"),
        ([*TOOL_ROW["messages"][:2], {"role": "user", "content": "Q"}], "turn of the tool is missing"),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": None}], "content is not text"),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": "sum"}],
            "tool_calls is not a list",
        ),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": [{"id": "1"}]}],
            "no function with a name",
        ),
        (
            [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            ],
            "arguments are no JSON",
        ),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "reasoning_content": "hm"}],
            "reasoning_content is not read",
        ),
        ([{"role": "user", "content": "Q", "tool_calls": [CALL]}, TURNS[1]], "only the assistant calls tools"),
    ],
)
def test_wrong_tool_messages_are_named(messages: list[dict[str, Any]], what: str) -> None:
    with pytest.raises(DataError, match=what):
        to_conversation({"messages": messages}, "messages", "f:1")


def test_tools_as_text_and_wrong_tools() -> None:
    row = {**TOOL_ROW, "tools": json.dumps(TOOL_ROW["tools"])}
    assert to_conversation(row, "messages", "f:1").tools == to_conversation(TOOL_ROW, "messages", "f:1").tools != ""
    for wrong in ("sum", 3, ["sum"], "[" * 100_000):
        with pytest.raises(DataError, match="tools is"):
            to_conversation({**TOOL_ROW, "tools": wrong}, "messages", "f:1")
