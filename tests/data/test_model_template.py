"""The model's own template: masks by prefix rendering, over templates that behave like the well-known ones."""

from typing import Any

import pytest

from anima.data.model_template import ModelTemplate
from anima.data.records import Conversation, Message
from anima.data.segments import Segment, join
from anima.errors import DataError, ModelError

USER, ANSWER = Message("user", "Q"), Message("assistant", "A")
TURNS = (USER, ANSWER, Message("user", "More?"), Message("assistant", "No."))

TRIMS = (  # like Llama 3: a BOS of its own, contents without white space at their ends
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
THINKS = (  # like Qwen 3: an empty thought before the last answer only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% else %}{% set thought = '' %}{% endif %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDS_IN_EOS = (  # like Phi 3.5: an EOS after everything, when no answer is asked for
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OPENS_A_THOUGHT = (  # like DeepSeek R1: the prompt ends in a thought that the data does not hold
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think>\n' }}{% endif %}"
)
REFUSES_SYSTEM = (  # like Gemma
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REFUSES_ODD_TEXT = (  # so that the texts have to be searched for
    "{% for m in messages %}{% if '\ue000' in m['content'] %}{{ raise_exception('odd') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHOUTS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def _segments(tokenizer: Any, *messages: Message, mask_answers: bool = True) -> list[Segment]:
    return ModelTemplate(tokenizer, mask_answers=mask_answers).segments(Conversation(messages, "f:1"))


def _learned(segments: list[Segment]) -> list[str]:
    """The learned stretches of text."""
    marked = "".join(s.text if s.trainable else "\x00" for s in segments)
    return [part for part in marked.split("\x00") if part]


def test_chatml_by_hand(byte_tokenizer: Any) -> None:
    assert _segments(byte_tokenizer(), Message("system", "S"), Message("user", "Q", "C"), ANSWER) == [
        Segment("<|im_start|>system\n", trainable=False),
        Segment("S", trainable=False, literal=True),
        Segment("<|im_end|>\n<|im_start|>user\n", trainable=False),
        Segment("Q\n\n", trainable=False, literal=True),
        Segment("C", trainable=False, trimmable=True, literal=True),
        Segment("<|im_end|>\n<|im_start|>assistant\n", trainable=False),
        Segment("A", trainable=True, literal=True),
        Segment("<|im_end|>", trainable=True),
        Segment("\n", trainable=False),
    ]


@pytest.mark.parametrize("role_like", ["user", "assistant\n", "<|im_end|>", "m", "im_start", "\n"])
def test_texts_are_found_even_where_the_scaffold_says_the_same(role_like: str, byte_tokenizer: Any) -> None:
    segments = _segments(byte_tokenizer(), Message("user", role_like), Message("assistant", "user"), *TURNS)
    assert [s.text for s in segments if s.trimmable] == [role_like, "Q", "More?"]
    assert _learned(segments) == ["user<|im_end|>", "A<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "learned", "tail"),
    [
        (None, ["A<|im_end|>", "No.<|im_end|>"], "\n"),
        (TRIMS, ["A<|im_end|>", "No.<|im_end|>"], ""),
        (THINKS, ["A<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"], "\n"),
        (ENDS_IN_EOS, ["A<|im_end|>", "No.<|im_end|>"], "\n</s>"),
        (REFUSES_SYSTEM, ["A<|im_end|>", "No.<|im_end|>"], ""),
    ],
)
def test_well_known_kinds_of_template(template: str | None, learned: list[str], tail: str, byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(template) if template else byte_tokenizer()
    segments = _segments(tokenizer, *TURNS)
    plain = [{"role": m.role, "content": m.content} for m in TURNS]
    text = tokenizer.apply_chat_template(plain, tokenize=False)
    assert join(segments) == text
    assert _learned(segments) == learned
    assert text.endswith(learned[-1] + tail)
    for end in (1, 3):
        prompt = tokenizer.apply_chat_template(plain[:end], tokenize=False, add_generation_prompt=True)
        assert ModelTemplate(tokenizer).prompt(TURNS[:end]) == prompt
        assert text.startswith(prompt)


def test_white_space_that_the_template_trims(byte_tokenizer: Any) -> None:
    segments = _segments(byte_tokenizer(TRIMS), Message("user", " Q\n"), Message("assistant", "\n A \n"))
    assert [s.text for s in segments if s.literal] == ["Q", "A"]
    named = _segments(byte_tokenizer(TRIMS), Message("user", " user\n"), ANSWER)
    assert [s.text for s in named][:2] == ["<s><|im_start|>user\n\n", "user"]
    context = _segments(byte_tokenizer(TRIMS), Message("user", "Q", "C\n"), ANSWER)
    assert [s.text for s in context if s.trimmable] == ["C"]


def test_texts_are_searched_for_where_marks_do_not_work(byte_tokenizer: Any) -> None:
    segments = _segments(byte_tokenizer(REFUSES_ODD_TEXT), *TURNS)
    assert [s.text for s in segments if s.literal] == ["Q", "A", "More?", "No."]
    with pytest.raises(DataError, match="changes the text of a message"):  # it is unclear which one is the text
        _segments(byte_tokenizer(REFUSES_ODD_TEXT), Message("user", "user"), ANSWER)


def test_the_longest_stop_token_is_taken(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(REFUSES_SYSTEM.replace("<|im_end|>", "<|im_end|>!"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>!"]})
    assert _learned(_segments(tokenizer, USER, ANSWER)) == ["A<|im_end|>!"]


def test_a_thought_in_the_data_is_learned_with_its_answer(byte_tokenizer: Any) -> None:
    said = "<think>\n1 + 1\n</think>\n\nIt is 2."
    assert _learned(_segments(byte_tokenizer(THINKS), USER, Message("assistant", said))) == [said + "<|im_end|>"]
    with pytest.raises(DataError, match="changes the text of a message"):  # the template cuts it out of earlier turns
        _segments(byte_tokenizer(THINKS), USER, Message("assistant", said), *TURNS)


def test_without_a_stop_token_of_the_template_the_eos_is_added(byte_tokenizer: Any) -> None:
    segments = _segments(byte_tokenizer(NO_STOP), USER, ANSWER)
    assert join(segments) == "user: Q\nassistant: A\n</s>"
    assert _learned(segments) == ["A\n</s>"]
    with pytest.raises(DataError, match="no stop token after an answer in the middle"):
        _segments(byte_tokenizer(NO_STOP), *TURNS)


def test_a_prompt_that_is_not_the_start_of_its_conversation_is_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="cannot be masked safely") as caught:
        _segments(byte_tokenizer(OPENS_A_THOUGHT), USER, ANSWER)
    assert caught.value.where == "f:1"
    assert "--train_on all" in str(caught.value.fix)
    assert "--chat_template alpaca" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("template", "messages", "what"),
    [
        (REFUSES_SYSTEM, (Message("system", "S"), *TURNS), "refuses the conversation: System role not supported"),
        (DROPS_SYSTEM, (Message("system", "Speak"), *TURNS), "changes the text of a message"),
        (SHOUTS, TURNS[2:], "changes the text of a message"),
    ],
)
def test_templates_that_do_not_fit_the_data(
    template: str, messages: tuple[Message, ...], what: str, byte_tokenizer: Any
) -> None:
    with pytest.raises(DataError, match=what) as caught:
        _segments(byte_tokenizer(template), *messages)
    assert caught.value.where == "f:1"


def test_without_a_mask_only_the_last_answer_is_told_apart(byte_tokenizer: Any) -> None:
    segments = _segments(byte_tokenizer(), *TURNS, mask_answers=False)
    assert join(segments) == join(_segments(byte_tokenizer(), *TURNS))
    assert _learned(segments) == ["No.<|im_end|>"]
    said = Message("assistant", "<think>\nh\n</think>\n\nA")
    thinking = _segments(byte_tokenizer(NO_STOP), USER, said, *TURNS, mask_answers=False)
    assert _learned(thinking) == ["No.\n</s>"]
    # A prompt that the conversation does not start with: no answer is told apart, and all is learned anyway.
    whole = _segments(byte_tokenizer(OPENS_A_THOUGHT), *TURNS, mask_answers=False)
    assert join(whole) == "user: Q<|im_end|>assistant: A<|im_end|>user: More?<|im_end|>assistant: No.<|im_end|>"
    assert _learned(whole) == []
    assert [s.text for s in whole if s.trimmable] == ["Q", "More?"]


def test_no_template_and_no_eos_are_refused(byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="brings no chat template"):
        ModelTemplate(byte_tokenizer(None))
    with pytest.raises(ModelError, match="no EOS token"):
        ModelTemplate(byte_tokenizer(eos=None))


def test_the_fingerprint_follows_the_rendering(byte_tokenizer: Any) -> None:
    dated = "{{ strftime_now('%H %M %S %f') }}" + NO_STOP
    assert ModelTemplate(byte_tokenizer(NO_STOP)).fingerprint == ModelTemplate(byte_tokenizer(NO_STOP)).fingerprint
    assert ModelTemplate(byte_tokenizer(NO_STOP)).fingerprint != ModelTemplate(byte_tokenizer(TRIMS)).fingerprint
    tokenizer = byte_tokenizer(dated)
    assert ModelTemplate(tokenizer).fingerprint != ModelTemplate(tokenizer).fingerprint
