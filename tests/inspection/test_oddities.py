"""Signs of damaged texts: each is found where it is, and ordinary texts in many scripts show none."""

import pytest

from anima.inspection.oddities import MEANINGS, oddities, seems_cut_off


@pytest.mark.parametrize(
    ("text", "name", "detail"),
    [
        ("a lost \ufffd character", "replacement characters", "lost \ufffd"),
        ("cafÃ© and â€™s", "mojibake", "'é'"),
        ("soft\u00adhyphen", "invisible characters", "U+00AD"),
        ("æ–‡", "mojibake", "'文'"),
        ("锟斤拷锟斤拷", "mojibake", "锟斤拷"),
        ("a bell \x07", "control characters", "U+0007"),
        ("from Windows \x92", "control characters", "U+0092"),
        ("zero\u200bwidth", "invisible characters", "U+200B"),
        ("right \u202eto left", "invisible characters", "U+202E"),
        ("a mark in \ufeffthe middle", "invisible characters", "U+FEFF"),
        ("a box \ue123", "private-use characters", "U+E123"),
        ("pаypal", "mixed scripts in a word", "pаypal"),  # the second letter is Cyrillic
        ("NASА in space", "mixed scripts in a word", "NASА"),
        ("gοod", "mixed scripts in a word", "gοod"),  # the second letter is Greek
        ("Sum.\n\n### Response: 3", "template artefacts", "### Response:"),
        ("done<|im_end|>", "template artefacts", "<|im_end|>"),
        ("[INST] hi [/INST]", "template artefacts", "[INST]"),
        ("fine\nUSER: and now?", "template artefacts", "USER:"),
        ("fine\n\nHuman: and now?", "template artefacts", "Human:"),
        ("x<end_of_turn>", "template artefacts", "<end_of_turn>"),
        ("<human>: hi", "template artefacts", "<human>:"),
        ("bye</s>", "template artefacts", "</s>"),
    ],
)
def test_signs(text: str, name: str, detail: str) -> None:
    found = oddities(text)
    assert name in found
    assert list(found) == [name]
    assert detail in found[name]
    assert name in MEANINGS


@pytest.mark.parametrize(
    "text",
    [
        "Plain English, with “quotes” — and dashes…\n\tand a tab.",
        "naïve café, Ærø, Łódź, İstanbul, Ångström, 5 €, 20 °C, §3, ½",
        "用一句话描述地球。iPhone 15 的价格是￥5,999，比GPT-4便宜。",
        "Это пример. Windows и Linux; vitamin С", "Ελληνικά, π and μm, Δx, kΩ, α-helix",
        "日本語とEnglishを混ぜる。カタカナ", "한국어 text", "العربية نص", "हिन्दी",
        "👩‍👩‍👧 emoji 🇩🇪 and می‌خواهم",
        "a <b>bold</b> tag, x < y, ## Heading, # Response, the user: me, Human beings, user: x",
        "def f(x):\n    return x  # Assistant: no",
    ],
)  # fmt: skip
def test_ordinary_texts_are_quiet(text: str) -> None:
    assert oddities(text) == {}


LONG = "This is a sentence that says something. " * 6


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (LONG + "And here it stops in the middle of a sent", True),
        (LONG + "The list is: one, two,", True),
        ("```python\nprint(1)", True),
        ("这是一句话。" * 40 + "而这句话在说到一半的时候突然就没有了下文因为生成的长度到了上限所以被截断了后面", True),
        (LONG.strip(), False),
        (LONG + "\n- apples\n- pears", False),
        ("Paris", False),
        ("42", False),
        (LONG + "```python\nprint(1)\n```", False),
        ("这是一句话。" * 40, False),
        (LONG + "See https://example.org/a/long/path/that/goes/on/and/on/", False),
    ],
)  # fmt: skip
def test_answers_that_seem_cut_off(answer: str, expected: bool) -> None:
    assert seems_cut_off(answer) is expected
