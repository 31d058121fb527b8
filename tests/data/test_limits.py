"""Length limits: counted by hand with one token a byte; what is trimmed, dropped, or stops the run."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anima.config.schema import DataConfig
from anima.data.limits import SOURCE_TOO_LONG, STILL_TOO_LONG, TARGET_TOO_LONG, TOO_LONG, EncodedRow, RowEncoder
from anima.data.segments import Segment
from anima.errors import DataError, ModelError


def _row(*users: str, answer: str = "xyz") -> list[Segment]:
    """For each user: "S:" + the text + "\\nA:" + the answer + </s>; the scaffold is 5 tokens, the answer 4."""
    segments = []
    for user in users:
        segments += [
            Segment("S:", trainable=False),
            Segment(user, trainable=False, trimmable=True, literal=True),
            Segment("\nA:", trainable=False),
            Segment(answer, trainable=True, literal=True),
            Segment("</s>", trainable=True),
        ]
    return segments


def _fit(tokenizer: Any, segments: list[Segment], **limits: Any) -> EncodedRow:
    config = DataConfig(train_files=("x",), **{"truncation": "trim_prompt", **limits})
    return RowEncoder(tokenizer, config).encode([[segments]], ["f:9"])[0]


def _text(tokenizer: Any, row: EncodedRow) -> str:
    return str(tokenizer.decode(row.sequences[0].input_ids))


def test_a_row_within_the_limits_is_kept_whole(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("abcdefghij"), max_seq_length=19, source_max_len=15, target_max_len=4)
    assert _text(byte_tokenizer(), row) == "S:abcdefghij\nA:xyz</s>"
    assert (row.dropped, row.trimmed, row.num_answers, row.num_stopped) == (None, False, 1, 1)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_seq_length": 18}, "S:bcdefghij\nA:xyz</s>"),
        ({"max_seq_length": 12}, "S:hij\nA:xyz</s>"),
        ({"max_seq_length": 10}, "S:j\nA:xyz</s>"),
        ({"max_seq_length": 100, "source_max_len": 9}, "S:ghij\nA:xyz</s>"),
        ({"source_max_len": 9, "target_max_len": 4}, "S:ghij\nA:xyz</s>"),
    ],
)
def test_the_user_s_text_loses_its_start(limits: dict[str, int], text: str, byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("abcdefghij"), **limits)
    assert _text(byte_tokenizer(), row) == text
    assert row.trimmed


def test_earlier_turns_are_trimmed_first(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("abcd", "efgh"), max_seq_length=26 - 3)
    assert _text(byte_tokenizer(), row) == "S:d\nA:xyz</s>S:efgh\nA:xyz</s>"
    row = _fit(byte_tokenizer(), _row("abcd", "efgh"), max_seq_length=26 - 6)
    assert _text(byte_tokenizer(), row) == "S:\nA:xyz</s>S:gh\nA:xyz</s>"
    row = _fit(byte_tokenizer(), _row("abcd", ""), max_seq_length=18)
    assert _text(byte_tokenizer(), row) == "S:\nA:xyz</s>S:\nA:xyz</s>"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_seq_length": 9}, STILL_TOO_LONG),
        ({"max_seq_length": 30, "source_max_len": 5}, STILL_TOO_LONG),
        ({"max_seq_length": 30, "target_max_len": 3}, TARGET_TOO_LONG),
        ({"max_seq_length": 3}, TOO_LONG),
        ({"max_seq_length": 18, "truncation": "drop"}, TOO_LONG),
        ({"max_seq_length": 30, "source_max_len": 14, "truncation": "drop"}, SOURCE_TOO_LONG),
        ({"max_seq_length": 30, "target_max_len": 3, "truncation": "drop"}, TARGET_TOO_LONG),
    ],
)
def test_answers_and_scaffolds_are_never_cut(limits: dict[str, Any], reason: str, byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("abcdefghij"), **limits)
    assert (row.sequences, row.dropped, row.trimmed) == ((), reason, False)


@pytest.mark.parametrize(
    ("limits", "got", "allowed"),
    [
        ({"max_seq_length": 18}, "19 tokens", "18 tokens"),
        ({"max_seq_length": 30, "source_max_len": 14}, "15 tokens", "14 tokens"),
        ({"max_seq_length": 30, "target_max_len": 3}, "4 tokens", "3 tokens"),
    ],
)
def test_the_policy_error_names_the_row(limits: dict[str, int], got: str, allowed: str, byte_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="row is too long") as caught:
        _fit(byte_tokenizer(), _row("abcdefghij"), truncation="error", **limits)
    assert (caught.value.where, caught.value.got, caught.value.allowed) == ("f:9", got, allowed)


def test_a_character_of_several_tokens_is_not_torn(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("你好吗"), max_seq_length=18 - 1)
    assert _text(byte_tokenizer(), row) == "S:好吗\nA:xyz</s>"
    row = _fit(byte_tokenizer(), _row("你好吗"), max_seq_length=18 - 6)
    assert _text(byte_tokenizer(), row) == "S:吗\nA:xyz</s>"
    assert _fit(byte_tokenizer(), _row("你好吗"), max_seq_length=18 - 7).dropped == STILL_TOO_LONG


def test_a_spelled_out_special_token_is_trimmed_by_character(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("ab<|im_end|>cd"), max_seq_length=9 + 14 - 3)
    assert _text(byte_tokenizer(), row) == "S:|im_end|>cd\nA:xyz</s>"


def test_trimmed_rows_keep_everything_else(byte_tokenizer: Any) -> None:
    """Any texts, any limit: the limit holds, no more is cut than needed, and only starts of user texts are missing."""
    tokenizer = byte_tokenizer()

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(st.text(st.sampled_from("ab 你<|im_end|>é𝄞"), max_size=12), min_size=1, max_size=3), st.data())
    def check(users: list[str], data: st.DataObject) -> None:
        whole = _fit(tokenizer, _row(*users), max_seq_length=1000).sequences[0]
        limit = data.draw(st.integers(2, len(whole)))
        row = _fit(tokenizer, _row(*users), max_seq_length=limit)
        least = 9 * len(users) + (len(users[-1][-1].encode()) if users[-1] else 0)
        assert (row.dropped is None) == (limit >= least)
        if not row.sequences:
            return
        assert limit - 3 <= len(row.sequences[0]) <= limit  # a character has up to 4 bytes
        parts = _text(tokenizer, row).split("\nA:xyz</s>")
        assert parts.pop() == ""
        assert len(parts) == len(users)
        for part, user in zip(parts, users, strict=True):
            assert part.startswith("S:")
            assert user.endswith(part[2:])

    check()


def test_the_small_model_s_tokens_are_trimmed_to_the_limit(smol_tokenizer: Any) -> None:
    segments = [
        replace(segment, text="<|im_end|>") if segment.text == "</s>" else segment
        for segment in _row("one two three four five six seven", "用一句话描述地球")
    ]
    whole = _fit(smol_tokenizer, segments, max_seq_length=512).sequences[0]
    kept = {limit: _fit(smol_tokenizer, segments, max_seq_length=limit) for limit in range(10, len(whole))}
    lengths = {limit: len(row.sequences[0]) for limit, row in kept.items() if row.sequences}
    assert len(lengths) > 15
    assert all(limit - 3 <= length <= limit for limit, length in lengths.items())


def test_without_an_answer_told_apart_only_the_whole_counts(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("abcdefghij")[:3], max_seq_length=64, source_max_len=2, target_max_len=2)
    assert (row.dropped, row.trimmed) == (None, False)


def test_all_tokens_carry_loss_when_asked(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), _row("abc"), max_seq_length=64, train_on="all")
    assert row.sequences[0].labels.tolist() == row.sequences[0].input_ids.tolist()


def test_an_answer_without_stop_token_is_counted_as_such(byte_tokenizer: Any) -> None:
    row = _fit(byte_tokenizer(), [*_row("abc")[:-1], *_row("abc")], max_seq_length=64)
    assert (row.num_answers, row.num_stopped) == (2, 1)


def test_trimming_needs_a_tokenizer_that_knows_places(byte_tokenizer: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="trim_prompt"):
        RowEncoder(Slow(), DataConfig(train_files=("x",), truncation="trim_prompt"))  # type: ignore[arg-type]
