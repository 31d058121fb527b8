"""Widths, escapes and wrapping: worked by hand, and as invariants over random text."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anima.tracking.terminal import cut, pad, printable, text_width, warn, wrap

# Latin, spaces, Chinese, full-width punctuation, a combining accent, a zero-width joiner, an emoji.
TEXT = st.text(alphabet="ab,. 中文。（）\u0301\u200d🙂\n", max_size=80)


@pytest.mark.parametrize(
    ("text", "columns"),
    [("", 0), ("abc", 3), ("你好", 4), ("a你b", 4), ("（ok）", 6), ("e\u0301", 1), ("ｆｕｌｌ", 8), ("ﾊ", 1)],
)
def test_width_counts_terminal_columns(text: str, columns: int) -> None:
    assert text_width(text) == columns


def test_control_characters_become_visible_and_text_stays() -> None:
    assert printable("a\x1b[2Jb\rc\x07\x00\x9b你\n\t") == "a\\x1b[2Jb\\rc\\x07\\x00\\x9b你\n\t"


def test_bidirectional_override_and_lone_surrogate_become_visible() -> None:
    assert printable("x\u202ey\ud800") == "x\\u202ey\\ud800"


def test_pad_fills_columns_not_characters() -> None:
    assert pad("你好", 6) == "你好  "
    assert pad("longer", 3) == "longer"


def test_cut_never_splits_a_wide_character() -> None:
    assert cut("a你b", 2) == "a"
    assert cut("a你b", 3) == "a你"


def test_wrap_breaks_at_spaces_and_between_chinese_characters() -> None:
    assert wrap("the quick brown fox", 9) == ["the quick", "brown fox"]
    assert wrap("我是小助手", 6) == ["我是小", "助手"]
    assert wrap("用 QLoRA 微调", 8) == ["用 QLoRA", "微调"]


def test_wrap_keeps_closing_punctuation_with_its_character() -> None:
    # Six columns hold three characters; the full stop may not open the second line, so 手 goes with it.
    assert wrap("小助手。", 6) == ["小助", "手。"]


def test_wrap_splits_a_word_that_fits_nowhere() -> None:
    assert wrap("ab abcdefg", 3) == ["ab", "abc", "def", "g"]


def test_wrap_keeps_newlines_and_gives_one_line_for_nothing() -> None:
    assert wrap("a\n\nb", 10) == ["a", "", "b"]
    assert wrap("", 10) == [""]


@given(TEXT, st.integers(2, 20))
def test_wrapped_lines_fit_and_lose_nothing_but_blanks(text: str, columns: int) -> None:
    lines = wrap(text, columns)
    assert all(text_width(line) <= columns for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_warning_survives_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    warn("heard")
    assert capsys.readouterr().err == "warning: heard\n"
    old = sys.stderr
    sys.stderr = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - put back and closed below
    try:
        warn("lost")
    finally:
        full, sys.stderr = sys.stderr, old
        with pytest.raises(OSError, match="space"):
            full.close()
