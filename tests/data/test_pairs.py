"""Pairs from files to micro-batches: the same prompt on both sides, nothing cut from answers, nothing lost unseen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anima.config.schema import DataConfig
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.kinds import PAIRS
from anima.data.loader import EvalLoader, StepLoader
from anima.data.pair_formats import PARTED
from anima.data.pairs import PairDataset
from anima.data.prepare import PreparedData, prepare_records
from anima.data.row_work import SAME_ANSWERS
from anima.errors import DataError

ROWS = [{"prompt": f"question {i}", "chosen": "c" * (3 + i % 5), "rejected": "r" * (1 + i % 7)} for i in range(23)]


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Any) -> Callable[..., PreparedData[PairDataset]]:
    """Prepare pairs with one token a byte; keyword arguments go to DataConfig, but for the tokenizer."""

    def call(*files: str, tokenizer: Any = None, **options: Any) -> PreparedData[PairDataset]:
        config = DataConfig(**{"train_files": files, "data_cache_dir": str(tmp_path / "cache"), **options})
        return prepare_records(PAIRS, config, tokenizer or byte_tokenizer(), seed=42)

    return call


def scored(side: TokenSequence) -> list[int]:
    return [int(i) for i in side.labels if i != IGNORE_INDEX]


def given(side: TokenSequence) -> list[int]:
    """What stands before the first scored token."""
    first = int(np.flatnonzero(side.labels != IGNORE_INDEX)[0])
    return [int(i) for i in side.input_ids[:first]]


def test_only_the_last_answer_is_scored_and_both_sides_have_the_same_prompt(run: Any, write_rows: Any) -> None:
    messages = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    messages += [{"role": "user", "content": "Q2"}]
    data = run(write_rows([{"prompt": messages, "chosen": "yes", "rejected": "no way"}]), chat_template="vicuna")
    chosen, rejected = data.train[0]
    assert given(chosen) == given(rejected)
    assert (len(scored(chosen)), len(scored(rejected))) == (len(" yes") + 1, len(" no way") + 1)
    assert scored(chosen)[-1] == scored(rejected)[-1] == 2  # </s>
    assert data.report.train.answers == data.report.train.stopped_answers == 2


def test_trimming_takes_the_same_from_both_prompts_and_nothing_from_answers(run: Any, write_rows: Any) -> None:
    # Plain template: prompt 12, answers 6 + EOS and 2 + EOS.
    row = {"prompt": "abcdefghijkl", "chosen": "ffffff", "rejected": "gg"}
    whole = run(write_rows([row]), chat_template="plain").train[0]
    data = run(write_rows([row]), chat_template="plain", max_seq_length=10, truncation="trim_prompt")
    chosen, rejected = data.train[0]
    assert (len(chosen), len(rejected)) == (10, 6)
    assert given(chosen) == given(rejected) == given(whole[0])[-3:]
    assert scored(chosen) == scored(whole[0])
    assert scored(rejected) == scored(whole[1])
    assert data.report.train.trimmed.rows == 1


def test_rows_that_cannot_be_used_are_counted_by_reason(run: Any, write_rows: Any) -> None:
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        {"prompt": "Q", "chosen": "A" * 40, "rejected": "A"},
        {"prompt": "Q", "chosen": "A", "rejected": "B" * 40},
        {"prompt": "Q" * 40, "chosen": "A", "rejected": "B"},
    ]
    found = run(write_rows(rows), chat_template="plain", max_seq_length=20).report.train
    reasons = {reason: tally.rows for reason, tally in found.dropped.items()}
    assert reasons == {SAME_ANSWERS: 1, "longer than max_seq_length": 3}
    assert (found.rows, found.kept) == (5, 1)
    trimmed = run(write_rows(rows), chat_template="plain", max_seq_length=20, truncation="trim_prompt").report.train
    assert (trimmed.kept, trimmed.trimmed.rows, sum(t.rows for t in trimmed.dropped.values())) == (2, 1, 3)
    dialogues = [
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
        {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: X\n\nAssistant: B"},
    ]
    assert run(write_rows(dialogues)).report.train.dropped[PARTED].rows == 1


def test_a_template_that_looks_at_the_answer_is_refused(run: Any, write_rows: Any, byte_tokenizer: Any) -> None:
    sly = (
        "{% for m in messages %}<|im_start|>{% if messages[-1]['content'] == 'B' %}!{% endif %}{{ m['content'] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    with pytest.raises(DataError):
        run(write_rows([{"prompt": "Q", "chosen": "A", "rejected": "B"}]), tokenizer=byte_tokenizer(sly))


def test_how_often_the_longer_answer_is_the_chosen_one_is_told_before_training(run: Any, write_rows: Any) -> None:
    rows = [
        {"prompt": "Q", "chosen": "A" * n, "rejected": "B" * m} for n, m in ((3, 1), (4, 2), (5, 1), (2, 2), (1, 7))
    ]
    data = run(write_rows(rows))
    assert data.train.chosen_longer() == (0.6, 0.2)
    assert data.train.longer_wins() == pytest.approx(0.7)
    lines = "\n".join(data.report.lines())
    assert "train: the chosen answer is the longer one in 60% of the pairs (equally long in 20%)" in lines
    assert "pairs to train on 5, held out 0" in lines


def test_the_split_keeps_pairs_whole_and_the_cache_is_its_own(run: Any, write_rows: Any) -> None:
    file = write_rows(ROWS)
    data = run(file, eval_size=6)
    assert (len(data.train), len(data.eval)) == (17, 6)
    assert run(file).report.train_cache.reused
    for part in (data.train, data.eval):
        for i in range(len(part)):
            row = ROWS[int(part.source(i).rpartition(":")[2]) - 1]
            assert [len(scored(side)) for side in part[i]] == [len(row["chosen"]) + 1, len(row["rejected"]) + 1]
            assert part.lengths[i] == part.batch([i]).input_ids.numel()
            assert part.batch([i]).num_tokens == sum(len(side) for side in part[i])


def test_a_batch_holds_its_pairs_one_behind_the_other(run: Any, write_rows: Any) -> None:
    data = run(write_rows(ROWS), chat_template="plain").train
    batch = data.batch([4, 0])
    assert batch.num_examples == 2
    wholes = [len(side) for i in (4, 0) for side in data[i]]
    prompts = [len(given(data[i][0])) for i in (4, 0)]
    assert batch.document_lengths == (wholes[0], wholes[1] - prompts[0] + 1, wholes[2], wholes[3] - prompts[1] + 1)
    assert batch.num_tokens == sum(wholes)
    assert batch.answer_tokens.tolist() == [8, 6, 4, 2]
    assert batch.num_scored == 20
    assert batch.reference_logps is None
    logps = np.arange(46, dtype=np.float32).reshape(23, 2)
    known = data.with_reference(logps)
    assert known.batch([4, 0]).reference_logps.tolist() == [[8, 9], [0, 1]]
    assert known.select([4, 0]).batch([0]).reference_logps.tolist() == [[8, 9]]
    moved = known.batch([4]).to("cpu")
    assert (moved.num_scored, moved.answer_tokens.tolist()) == (14, [8, 6])
    empty = known.filler()
    assert (empty.num_examples, empty.num_scored, empty.reference_logps.shape) == (0, 0, (0, 2))
    logps[4] = np.nan
    with pytest.raises(ValueError, match="unknown for some"):
        known.batch([4])
    with pytest.raises(ValueError, match="shape"):
        data.with_reference(logps[:5])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_steps_hold_the_same_pairs_on_any_number_of_ranks(world_size: int, run: Any, write_rows: Any) -> None:
    data = run(write_rows(ROWS), chat_template="plain").train
    data = data.with_reference(np.arange(46, dtype=np.float32).reshape(23, 2))
    place: dict[str, Any] = {"micro_batch_tokens": 100, "packing": True, "world_size": world_size}
    for step in range(3):
        loaders = [StepLoader(data, global_batch_size=7, seed=1, rank=rank, **place) for rank in range(world_size)]
        ranks = [loader.step(step) for loader in loaders]
        assert len({len(batches) for batches in ranks}) == 1
        seen = [row for batches in ranks for batch in batches for row in batch.reference_logps.tolist()]
        expected = [[2 * i, 2 * i + 1] for i in loaders[0].rows(step).tolist()]
        assert sorted(seen) == sorted(expected)
        assert all(batch.input_ids.shape[1] <= 100 for batches in ranks for batch in batches)
        assert all(
            len(batch.document_lengths) == 2 * batch.num_examples for b in ranks for batch in b if batch.num_scored
        )
    held_out = [list(EvalLoader(data, rank=rank, **place)) for rank in range(world_size)]
    seen = [row for batches in held_out for batch in batches for row in batch.reference_logps.tolist()]
    assert sorted(seen) == [[2 * i, 2 * i + 1] for i in range(23)]


@pytest.mark.parametrize(
    ("name", "layout", "rows"),
    [
        ("dpo_zh_demo.json", "sharegpt_preference", 300),
        ("dpo_en_demo.json", "sharegpt_preference", 300),
        ("anima_dpo_pairs_belle_gold.jsonl", "alpaca_preference", 622),
        ("anima_dpo_pairs_pre_post.jsonl", "alpaca_preference", 998),
    ],
)
def test_every_row_of_real_files_is_accounted_for(
    name: str, layout: str, rows: int, run: Any, shared_data_dir: Path, smol_tokenizer: Any
) -> None:
    data = run(str(shared_data_dir / name), tokenizer=smol_tokenizer, max_seq_length=600, truncation="trim_prompt")
    found = data.report.train
    assert (found.rows, found.formats) == (rows, {layout: rows})
    assert found.kept + sum(tally.rows for tally in found.dropped.values()) == rows
    assert len(data.train) == found.kept > rows * 0.3
    assert found.longest <= 600
    assert data.train.lengths.tolist() == [data.train.batch([i]).input_ids.numel() for i in range(len(data.train))]
    whole = sum(len(side) for i in range(len(data.train)) for side in data.train[i])
    assert data.train.lengths.sum() < 0.85 * whole
    for i in (0, len(data.train) // 2, len(data.train) - 1):
        chosen, rejected = data.train[i]
        assert given(chosen) == given(rejected)
        assert scored(chosen) != scored(rejected)
    assert found.stopped_answers == found.answers == 2 * found.kept


def test_the_alpaca_file_means_the_same_as_its_plain_prompts(
    run: Any, shared_data_dir: Path, smol_tokenizer: Any
) -> None:
    file = str(shared_data_dir / "anima_dpo_pairs_belle_gold.jsonl")
    taken_apart = run(file, tokenizer=smol_tokenizer, chat_template="alpaca")
    as_it_is = run(file, tokenizer=smol_tokenizer, chat_template="plain", dataset_format="preference")
    for i in range(0, len(as_it_is.train), 50):
        for one, other in zip(taken_apart.train[i], as_it_is.train[i], strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            assert one.labels.tolist() == other.labels.tolist()


def test_torch_is_given_what_numpy_holds(run: Any, write_rows: Any) -> None:
    data = run(write_rows(ROWS[:1]), chat_template="plain").train
    batch = data.batch([0])
    chosen, rejected = data[0]
    known = len(given(chosen)) - 1
    assert batch.input_ids[0].tolist() == [*chosen.input_ids.tolist(), *rejected.input_ids[known:].tolist()]
    assert batch.input_ids.dtype == batch.answer_tokens.dtype == torch.int64
    assert batch.position_ids[0].tolist() == [*range(len(chosen)), *range(known, len(rejected))]


def test_a_first_token_without_a_prompt_is_not_scored(run: Any, write_rows: Any) -> None:
    data = run(write_rows([{"prompt": "", "chosen": "abc", "rejected": "d"}]), chat_template="plain").train
    batch = data.batch([0])
    assert batch.document_lengths == (4, 2)
    assert batch.answer_tokens.tolist() == [3, 1]  # the first is predicted from nothing
    assert batch.num_scored == 4
