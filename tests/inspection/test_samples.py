"""Rows as they are shown: the tokens are those of training, and each piece knows its speaker."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import DataConfig
from anima.data.encode import IGNORE_INDEX
from anima.data.kinds import CONVERSATIONS, PAIRS
from anima.data.prepare import prepare, prepare_records
from anima.data.templates import make_template
from anima.errors import DataError
from anima.inspection.pages import samples_page, stats_page
from anima.inspection.samples import Sample, SampleReader, whole_texts
from anima.inspection.stats import QUANTILES, Histogram, Packing, Stats
from anima.inspection.terminal import Painter, histogram_lines, legend, sample_lines, stats_lines

ROWS = [
    {
        "messages": [
            {"role": "system", "content": "Be <b>terse</b>."},
            {"role": "user", "content": "数学 😀 <|im_end|>?"},
            {"role": "assistant", "content": "Yes.\né"},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "Sure."},
        ]
    },
    {"messages": [{"role": "user", "content": "Q"}]},
    {"messages": [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "A \x1b[31m"}]},
]


@pytest.fixture
def read(tmp_path: Path, write_rows: Any) -> Callable[..., list[Sample]]:
    def call(tokenizer: Any, *wanted: str, rows: Any = ROWS, **options: Any) -> list[Sample]:
        config = DataConfig(
            train_files=(write_rows(rows),), data_cache_dir=str(tmp_path / "c"), bad_rows="drop", **options
        )
        template = make_template(config.chat_template, tokenizer)
        samples = SampleReader(CONVERSATIONS, config, tokenizer, template).read("train_files", wanted)
        data = prepare(config, tokenizer, seed=1, template=template).train
        kept = {data.source(i): data[i] for i in range(len(data))}
        for sample in samples:
            assert sample.kept == (sample.source in kept)
            if sample.kept:  # what is shown is what is trained on, to the token
                pairs = [(i, p.learned) for p in sample.pieces for i in p.ids]
                sequence = kept[sample.source]
                assert [i for i, _ in pairs] == sequence.input_ids.tolist()
                assert [learned for _, learned in pairs] == (sequence.labels != IGNORE_INDEX).tolist()
        return samples

    return call


@pytest.mark.parametrize("name", ["byte_tokenizer", "smol_tokenizer"])
def test_pieces_and_speakers(name: str, read: Any, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    (sample,) = read(found() if name == "byte_tokenizer" else found, "1")
    said: dict[str, str] = {}
    for piece in sample.pieces:
        said[piece.role] = said.get(piece.role, "") + piece.text
    assert said["system"] == "Be <b>terse</b>."
    assert said["user"] == "数学 😀 <|im_end|>?Sure?"
    assert said["assistant"] == "Yes.\néSure."
    assert "".join(p.text for p in sample.pieces if p.learned) == "Yes.\né<|im_end|>Sure.<|im_end|>"
    assert [p.text for p in sample.pieces if p.special].count("<|im_end|>") == 5
    assert all("\ufffd" not in p.text for p in sample.pieces)
    assert (sample.status, sample.layout) == ("kept", "messages")


def test_tokenizers_that_swallow_spaces(spm_tokenizer: Any) -> None:
    ids = spm_tokenizer("hello world an é task", add_special_tokens=False)["input_ids"]
    pieces = list(whole_texts(spm_tokenizer, ids))
    assert [i for _, part in pieces for i in part] == ids
    assert "".join(text for text, _ in pieces) == spm_tokenizer.decode(ids)


def test_rows_that_are_left_out_or_trimmed(read: Any, byte_tokenizer: Any) -> None:
    bad, long = read(byte_tokenizer(), "2", "3", max_seq_length=200)
    assert bad.status == "left out, the conversation ends without an answer (messages[0].role)"
    assert "'content': 'Q'" in bad.pieces[0].text
    assert long.status.startswith("left out, longer than max_seq_length (5")
    (trimmed,) = read(byte_tokenizer(), "3", max_seq_length=200, truncation="trim_prompt")
    assert trimmed.status.startswith("trimmed from 5")
    assert trimmed.cut.startswith("word word word")
    shown = "".join(p.text for p in trimmed.pieces if p.role == "user")
    assert trimmed.cut + shown == "word " * 100


def test_an_answer_that_repeats_the_question_is_the_assistants(read: Any, byte_tokenizer: Any) -> None:
    turns = [("user", "A or B?"), ("assistant", "B"), ("user", "B"), ("assistant", "A or B?")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (sample,) = read(byte_tokenizer(), "1", rows=[row])
    spoken = [(p.role, p.text) for p in sample.pieces if p.role in ("user", "assistant")]
    assert "".join(text for role, text in spoken if role == "user") == "A or B?B"
    assert "".join(text for role, text in spoken if role == "assistant") == "BA or B?"


def test_a_text_without_turns_is_not_shown_in_a_chat_template(
    byte_tokenizer: Any, write_rows: Any, tmp_path: Path
) -> None:
    config = DataConfig(train_files=(write_rows([{"text": "once"}]),), data_cache_dir=str(tmp_path / "c"))
    reader = SampleReader(CONVERSATIONS, config, byte_tokenizer(), make_template("model", byte_tokenizer()))
    (sample,) = reader.read("train_files", ["1"])
    assert sample.status == "left out, a text without turns has no place in a chat template"
    assert [piece.text for piece in sample.pieces] == ["text: once\n"]


def test_both_sides_of_a_pair(byte_tokenizer: Any, write_rows: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}, {"from": "human", "value": "R"}]
    pair = {
        "conversations": turns,
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "no"},
    }
    same = {"prompt": "Q", "chosen": "A", "rejected": "A"}
    tokenizer = byte_tokenizer()
    for row, status in ((pair, "kept"), (same, "left out, chosen and rejected are the same")):
        config = DataConfig(train_files=(write_rows([row], "p.jsonl"),), data_cache_dir=str(tmp_path / "c"))
        reader = SampleReader(PAIRS, config, tokenizer, make_template("auto", tokenizer))
        chosen, rejected = reader.read("train_files", ["1"])
        assert chosen.source.endswith("p.jsonl:1 chosen")
        assert rejected.source.endswith("p.jsonl:1 rejected")
        assert chosen.status == status
    config = DataConfig(train_files=(write_rows([pair], "p.jsonl"),), data_cache_dir=str(tmp_path / "c"))
    samples = SampleReader(PAIRS, config, tokenizer, make_template("auto", tokenizer)).read("train_files", ["1"])
    for sample, sequence in zip(samples, prepare_records(PAIRS, config, tokenizer, seed=1).train[0], strict=True):
        pairs = [(i, p.learned) for p in sample.pieces for i in p.ids]
        assert [i for i, _ in pairs] == sequence.input_ids.tolist()
        assert [learned for _, learned in pairs] == (sequence.labels != IGNORE_INDEX).tolist()


def test_rows_are_found_by_number_and_by_place(read: Any, byte_tokenizer: Any) -> None:
    first, third = read(byte_tokenizer(), "3", "1")
    assert (first.source[-2:], third.source[-2:]) == (":1", ":3")
    (named,) = read(byte_tokenizer(), third.source)
    assert named == third
    with pytest.raises(DataError, match="no such row") as caught:
        read(byte_tokenizer(), "1", "99")
    assert caught.value.got == "99"


def test_all_tokens_learned(read: Any, byte_tokenizer: Any) -> None:
    (sample,) = read(byte_tokenizer(), "1", train_on="all")
    assert sample.learned == sample.tokens


def test_the_terminal(read: Any, byte_tokenizer: Any) -> None:
    samples = read(byte_tokenizer(), "1", "3")
    plain = sample_lines(samples[0], Painter(False), boundaries=False)
    assert "[user]数学 😀 <|im_end|>?<|im_end|>" in plain[-1]
    assert "[assistant, learned]⟦Yes.\né<|im_end|>⟧" in plain[-1]
    assert "\x1b" not in "".join(sample_lines(samples[1], Painter(False), boundaries=False))
    assert "A \\x1b[31m" in sample_lines(samples[1], Painter(False), boundaries=False)[-1]
    borders = sample_lines(samples[0], Painter(False), boundaries=True)[-1]
    assert "数│││学│││" in borders
    colours = sample_lines(samples[0], Painter(True), boundaries=False)[-1]
    assert "\x1b[1;32mYes.\x1b[0m\n\x1b[1;32mé\x1b[0m" in colours
    assert "⟦" not in colours
    assert "learned" in legend(Painter(True))


def test_the_page_escapes_the_data(read: Any, byte_tokenizer: Any) -> None:
    samples = read(byte_tokenizer(), "1", "2", "3", max_seq_length=300, truncation="trim_prompt")
    page = samples_page(samples, title="<i>", note='"&', boundaries=False)
    assert ">&lt;</span>" in page
    assert "><</span>" not in page
    assert "&lt;i&gt;" in page
    assert "<script" not in page
    assert "http" not in page
    assert "[U+001B]" in page
    assert 'data-n="3"' in page
    assert page.count("<article") == page.count("</article>") == 3
    assert '<span class="cut">word' in page


def test_figures_on_page_and_terminal() -> None:
    stats = Stats(
        rows=3,
        quantiles={kind: {f"{q:g}": 1234.5 for q in QUANTILES} for kind in ("source", "target", "total")},
        limits={"source": None, "target": 50, "total": 20},
        over_limit={"source": 0.0, "target": 0.25, "total": 1 / 3},
        histogram=Histogram([0, 10, 20, 31], [1, 0, 2]),
        supervised_share=0.5,
        unit="sequences",
        examples_an_epoch=3,
        tokens_an_epoch=1000,
        steps_an_epoch=2,
        examples_a_step=2,
        micro_batch_tokens=8192,
        ranks=2,
        packing=Packing(2, 1.5, 2, 0.75),
    )
    text = "\n".join(stats_lines(stats, Painter(False)))
    for part in ("1,234.5", "33.33%", "25.00%", "3 sequences, 1,000 tokens, 2 steps of 2", "75.0% of that budget"):
        assert part in text
        assert part in stats_page(stats, title="T", notes=[])
    bars = histogram_lines(stats.histogram, 19, Painter(False))
    assert [line.count("█") for line in bars[1:]] == [24, 0, 48]
    assert [line.endswith("over") for line in bars] == [False, False, False, True]
