"""The whole stage: files in, two sets and a report out; the split, and every way it refuses."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from anima.config.schema import DataConfig
from anima.data.encode import IGNORE_INDEX
from anima.data.kinds import CONVERSATIONS
from anima.data.prepare import prepare, tokenise
from anima.data.segments import Segment
from anima.data.templates import make_template
from anima.errors import DataError

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(20)]


def _texts(dataset: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(dataset[i].input_ids) for i in range(len(dataset))]


def test_every_kind_of_file_gives_the_same_sequences(
    run: Any, byte_tokenizer: Any, tmp_path: Path, write_rows: Any
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    names = [write_rows(PAIRS)]
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"rows{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(PAIRS)
        names.append(str(tmp_path / f"rows{suffix}"))
    (tmp_path / "rows.json").write_text(json.dumps(PAIRS))
    pq.write_table(pa.Table.from_pylist(PAIRS), tmp_path / "rows.parquet")
    names += [str(tmp_path / "rows.json"), str(tmp_path / "rows.parquet")]
    expected = [
        f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n{r['completion']}<|im_end|>\n"
        for r in PAIRS
    ]
    for name in names:
        data = run(name)
        assert _texts(data.train, byte_tokenizer()) == expected
        assert data.report.train.formats == {"prompt_completion": 20}
    assert run(names[0]).train.source(2) == f"{names[0]}:3"
    assert run(names[1]).train.source(2) == f"{names[1]}:4"
    assert run(names[4]).train.source(2) == f"{names[4]}: row 3"


def test_the_report_counts_by_hand(run: Any, write_rows: Any) -> None:
    # Plain template, one token a byte: prompt 2, answer and EOS.
    rows = [{"prompt": "ab", "completion": "x" * n} for n in (1, 2, 3, 30, 3, 40, 50, 60, 70)]
    report = run(write_rows(rows), chat_template="plain", max_seq_length=16, target_max_len=35).report
    found = report.train
    assert (found.rows, found.kept, found.answers, found.stopped_answers) == (9, 4, 4, 4)
    assert (found.tokens, found.supervised_tokens, found.longest) == (4 * 3 + 9, 9 + 4, 6)
    assert {reason: tally.rows for reason, tally in found.dropped.items()} == {"answer longer than target_max_len": 5}
    tally = found.dropped["answer longer than target_max_len"]
    assert [place.rpartition(":")[2] for place in tally.first] == ["4", "6", "7"]
    lines = "\n".join(report.lines())
    for part in (
        "rows 9 (prompt_completion 9), kept 4",
        "rows.jsonl:4",
        ", ...",
        "100% end in a supervised stop token",
    ):
        assert part in lines


def test_every_answer_is_supervised_up_to_its_stop_token(run: Any, write_rows: Any, smol_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}] * 3
    data = run(write_rows([{"messages": turns}]), tokenizer=smol_tokenizer)
    labels = data.train[0].labels
    learned = [int(i) for i in labels if i != IGNORE_INDEX]
    assert smol_tokenizer.decode(learned) == "A<|im_end|>" * 3
    assert data.report.train.answers == data.report.train.stopped_answers == 3


def test_all_tokens_carry_loss_when_asked(run: Any, write_rows: Any) -> None:
    data = run(write_rows(PAIRS), train_on="all")
    assert data.train[0].labels.tolist() == data.train[0].input_ids.tolist()
    assert data.report.train.supervised_tokens == data.report.train.tokens - 20


def test_texts_without_turns(run: Any, write_rows: Any, byte_tokenizer: Any) -> None:
    file = write_rows([{"text": "Once upon a time."}, {"text": "### A heading"}])
    data = run(file, chat_template="plain", tokenizer=byte_tokenizer(adds_bos=True))
    assert _texts(data.train, byte_tokenizer()) == ["<s>Once upon a time.</s>", "<s>### A heading</s>"]
    assert data.train[0].labels.tolist() == [IGNORE_INDEX, *data.train[0].input_ids[1:].tolist()]
    for policy in ("error", "drop"):  # a mistake in the options, not in the rows
        with pytest.raises(DataError, match="no place in a chat template") as caught:
            run(file, bad_rows=policy)
        assert "--chat_template plain" in str(caught.value.fix)


def test_lengths_of_all_rows_are_kept_beside_the_tokens(byte_tokenizer: Any, tmp_path: Path, write_rows: Any) -> None:
    file = write_rows([{"prompt": "ab", "completion": "x" * n} for n in (1, 50, 3)])
    config = DataConfig(
        train_files=(file,), data_cache_dir=str(tmp_path), chat_template="plain", max_seq_length=20, data_workers=1
    )
    whole = tokenise(CONVERSATIONS, config, byte_tokenizer(), make_template("plain", byte_tokenizer()))[0]
    assert whole.lengths().tolist() == [[2, 2, 4], [2, 51, 53], [2, 4, 6]]
    assert len(whole.dataset) == 2


# The split ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "held_out"), [(3, 3), (1, 1), (0.25, 5), (0.99, 20), (19, 19)])
def test_the_split_loses_no_row(size: float, held_out: int, run: Any, write_rows: Any, byte_tokenizer: Any) -> None:
    file = write_rows(PAIRS)
    if held_out == 20:
        with pytest.raises(DataError, match="nothing would be left to train on"):
            run(file, eval_size=size)
        return
    data = run(file, eval_size=size)
    assert (len(data.eval), data.report.eval_rows) == (held_out, held_out)
    sources = [d.source(i) for d in (data.train, data.eval) for i in range(len(d))]
    assert sorted(sources) == sorted(f"{file}:{line}" for line in range(1, 21))
    again = run(file, eval_size=size)
    assert again.report.train_cache.reused
    assert _texts(again.eval, byte_tokenizer()) == _texts(data.eval, byte_tokenizer())
    assert again.eval.fingerprint == data.eval.fingerprint != data.train.fingerprint


def test_the_seed_moves_the_split_but_not_the_cache(run: Any, write_rows: Any) -> None:
    file = write_rows(PAIRS)
    splits = [run(file, eval_size=5, seed=seed) for seed in range(4)]
    assert [data.report.train_cache.reused for data in splits] == [False, True, True, True]
    held_out = {tuple(data.eval.source(i) for i in range(5)) for data in splits}
    assert len(held_out) == 4
    assert all(list(rows) == sorted(rows, key=lambda s: int(s.rpartition(":")[2])) for rows in held_out)


@pytest.mark.parametrize(
    ("size", "what"),
    [(20, "nothing would be left"), (21, "nothing would be left"), (0.02, "nothing would be held out")],
)
def test_an_empty_part_is_refused(size: float, what: str, run: Any, write_rows: Any) -> None:
    with pytest.raises(DataError, match=what) as caught:
        run(write_rows(PAIRS), eval_size=size)
    assert caught.value.where == "--eval_size"


def test_held_out_files(run: Any, write_rows: Any) -> None:
    train, held_out = write_rows(PAIRS[:15], "train.jsonl"), write_rows(PAIRS[15:], "eval.jsonl")
    data = run(train, eval_files=(held_out,))
    assert (len(data.train), len(data.eval)) == (15, 5)
    assert data.eval.source(0) == f"{held_out}:1"
    assert data.report.eval.rows == 5
    assert any(line.startswith("eval: files") for line in data.report.lines())
    with pytest.raises(DataError, match="also trained on"):
        run(train, eval_files=(write_rows(PAIRS[:15], "copy.jsonl"),))


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("", "", "holds no rows"),
        ("[]", None, "not an object"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', ":2", "wrong JSON"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ":2", "no key completion"),
        ('{"question": "a"}\n', ":1", "fits no known format"),
        ('{"prompt": "a", "completion": ""}\n', ":1", "answer is empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', ":1", "ends without an answer"),
    ],
)
def test_wrong_files(text: str, place: str | None, what: str, run: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        run(str(file))
    if place is not None:
        assert caught.value.where == f"{file}{place}"


def test_nothing_left_names_the_reasons(run: Any, write_rows: Any) -> None:
    with pytest.raises(DataError, match="no row is left") as caught:
        run(write_rows(PAIRS), max_seq_length=8)
    assert "20 rows; dropped: longer than max_seq_length: 20 (" in str(caught.value.got)


def test_an_answer_without_stop_token_is_refused(
    run: Any, write_rows: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    template = make_template("plain", byte_tokenizer())

    class Endless:
        name, fingerprint = "endless", "endless"
        prompt_segments, prompt = template.prompt_segments, template.prompt

        def segments(self, conversation: Any) -> list[Segment]:
            return template.segments(conversation)[:-1]

    config = DataConfig(train_files=(write_rows(PAIRS),), data_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="without a supervised stop token") as caught:
        prepare(config, byte_tokenizer(), seed=1, template=Endless())
    assert caught.value.got == "20 of 20 answers"


def test_a_row_too_long_stops_the_run_when_asked(run: Any, write_rows: Any) -> None:
    file = write_rows([*PAIRS, {"prompt": "x" * 2000, "completion": "y"}])
    with pytest.raises(DataError, match="row is too long") as caught:
        run(file, truncation="error")
    assert caught.value.where == f"{file}:21"


def test_real_data(run: Any, shared_data_dir: Path, smol_tokenizer: Any) -> None:
    data = run(str(shared_data_dir / "alpaca_zh_demo.json"), tokenizer=smol_tokenizer, eval_size=0.1)
    found = data.report.train
    assert (found.rows, found.formats) == (1000, {"alpaca": 1000})
    assert found.kept + sum(tally.rows for tally in found.dropped.values()) == 1000
    assert found.kept > 900
    assert found.longest <= 1024
    assert len(data.train) + len(data.eval) == found.kept
    assert int(data.train.lengths.sum() + data.eval.lengths.sum()) == found.tokens
    for i in (0, 17, len(data.train) - 1):
        labels = data.train[i].labels
        assert labels[labels != IGNORE_INDEX][-1] == smol_tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("belle_zh_seed_tasks.jsonl", "fits no known format"),
        ("dpo_en_demo.json", "ends without an answer"),
    ],
)
def test_real_data_of_other_layouts_is_refused(name: str, what: str, run: Any, shared_data_dir: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        run(str(shared_data_dir / name))
    assert str(caught.value.where).startswith(str(shared_data_dir / name) + ":")
