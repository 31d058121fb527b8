"""The plain-text templates, compared with texts written out by hand and with the ancestor's golden cases."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima.data.formats import to_conversation
from anima.data.records import Conversation, Message
from anima.data.segments import Segment, join
from anima.data.text_templates import TextTemplate
from anima.errors import DataError, ModelError

TWO_TURNS = (
    Message("user", "Sort", "b a"),
    Message("assistant", "a b"),
    Message("user", "Again"),
    Message("assistant", "a b."),
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _text(name: str, tokenizer: Any, *messages: Message) -> str:
    return join(TextTemplate(name, tokenizer).segments(Conversation(messages, "f:1")))


def test_golden_cases_of_the_ancestor(byte_tokenizer: Any, shared_data_dir: Path) -> None:
    """Same text for the same row, but for `input: null`, which the ancestor printed as None (defect B9)."""
    cases = json.loads((shared_data_dir / "golden_cases.json").read_text("utf-8"))["format_cases"]
    templates = {"alpaca": "alpaca", "self-instruct": "plain", "input-output": "plain", "long_data": "plain"}
    formats = {"self-instruct": "prompt_completion", "input-output": "input_output", "long_data": "prompt_completion"}
    seen = []
    for case in cases:
        if case["format"] not in templates:
            continue
        template = TextTemplate(templates[case["format"]], byte_tokenizer())
        conversation = to_conversation(case["row"], formats.get(case["format"], "alpaca"), "golden")
        expected = case["source"]
        if "input" in case["row"] and case["row"]["input"] is None:
            expected = cases[2]["source"]
            assert cases[2]["row"] == {"instruction": case["row"]["instruction"], "output": case["row"]["output"]}
        assert template.prompt(conversation.messages[:1]) == expected
        assert join(template.segments(conversation)) == expected + case["target"] + "</s>"
        seen.append(case["format"])
    assert seen == ["alpaca"] * 4 + ["self-instruct", "input-output", "long_data"]


def test_alpaca_repeats_its_blocks(byte_tokenizer: Any) -> None:
    preamble = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    turns = (
        "### Instruction:\nSort\n\n### Input:\nb a\n\n### Response: a b</s>"
        "\n\n### Instruction:\nAgain\n\n### Response: a b.</s>"
    )
    assert _text("alpaca", byte_tokenizer(), *TWO_TURNS) == preamble + turns
    assert _text("alpaca", byte_tokenizer(), Message("system", "Be brief."), *TWO_TURNS) == "Be brief.\n\n" + turns


def test_vicuna(byte_tokenizer: Any) -> None:
    turns = " USER: Sort\n\nb a ASSISTANT: a b</s>USER: Again ASSISTANT: a b.</s>"
    assert _text("vicuna", byte_tokenizer(), *TWO_TURNS) == VICUNA + turns
    assert _text("vicuna", byte_tokenizer(), Message("system", "S."), *TWO_TURNS) == "S." + turns
    assert TextTemplate("vicuna", byte_tokenizer()).prompt([Message("user", "Q")]) == VICUNA + " USER: Q ASSISTANT:"


def test_guanaco(byte_tokenizer: Any) -> None:
    turns = "### Human: Sort\n\nb a\n### Assistant: a b</s>\n### Human: Again\n### Assistant: a b.</s>"
    assert _text("guanaco", byte_tokenizer(), *TWO_TURNS) == turns
    assert _text("guanaco", byte_tokenizer(), Message("system", "S."), *TWO_TURNS) == "S.\n" + turns


@pytest.mark.parametrize("messages", [TWO_TURNS, (Message("system", "S"), *TWO_TURNS[:2])])
def test_plain_holds_one_exchange_only(messages: tuple[Message, ...], byte_tokenizer: Any) -> None:
    assert _text("plain", byte_tokenizer(), *TWO_TURNS[:2]) == "Sort\n\nb aa b</s>"
    with pytest.raises(DataError, match="one prompt and one answer") as caught:
        _text("plain", byte_tokenizer(), *messages)
    assert caught.value.where == "f:1"


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "guanaco", "plain"])
def test_bos_comes_from_a_tokenizer_that_adds_it_by_default(name: str, byte_tokenizer: Any) -> None:
    without = _text(name, byte_tokenizer(), *TWO_TURNS[:2])
    assert not without.startswith("<s>")
    assert _text(name, byte_tokenizer(adds_bos=True), *TWO_TURNS[:2]) == "<s>" + without


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "guanaco", "plain"])
def test_what_is_learned_is_each_answer_and_its_stop_token(name: str, byte_tokenizer: Any) -> None:
    messages = TWO_TURNS[:2] if name == "plain" else TWO_TURNS
    segments = TextTemplate(name, byte_tokenizer()).segments(Conversation(messages, "f:1"))
    learned = "".join(s.text if s.trainable else "|" for s in segments).strip("|")
    answers = [part for part in learned.split("|") if part]
    space = " " if name in ("vicuna", "guanaco") else ""
    assert answers == [f"{space}{m.content}</s>" for m in messages if m.role == "assistant"]


def test_only_the_user_s_text_may_be_trimmed_and_of_a_context_only_that(byte_tokenizer: Any) -> None:
    segments = TextTemplate("vicuna", byte_tokenizer()).segments(Conversation(TWO_TURNS, "f:1"))
    assert [s.text for s in segments if s.trimmable] == ["b a", "Again"]
    assert Segment("Sort", trainable=False, literal=True) in segments
    assert {s.text for s in segments if s.literal} == {"Sort", "b a", "a b", "Again", "a b.", VICUNA}


def test_a_tokenizer_without_eos_is_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no EOS token"):
        TextTemplate("alpaca", byte_tokenizer(eos=None))


def test_an_eos_of_several_tokens_is_refused(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()

    class Broken:
        eos_token, bos_token = "END", None
        added_tokens_decoder = tokenizer.added_tokens_decoder
        convert_tokens_to_ids = staticmethod(tokenizer.convert_tokens_to_ids)
        __call__ = staticmethod(tokenizer.__call__)

    with pytest.raises(ModelError, match="no single token"):
        TextTemplate("alpaca", Broken())  # type: ignore[arg-type]


def test_the_fingerprint_tells_templates_and_bos_apart(byte_tokenizer: Any) -> None:
    prints = {
        TextTemplate(name, byte_tokenizer(adds_bos=bos)).fingerprint
        for name in ("alpaca", "vicuna", "guanaco", "plain")
        for bos in (False, True)
    }
    assert len(prints) == 8
