"""Sequences on disk: what is written comes back, mapped and not read, with its source."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anima.data.dataset import SequenceWriter, TokenizedDataset, stretches
from anima.data.encode import IGNORE_INDEX, TokenSequence


def _sequence(ids: list[int], learned: list[bool]) -> TokenSequence:
    labels = [i if flag else IGNORE_INDEX for i, flag in zip(ids, learned, strict=True)]
    return TokenSequence(np.array(ids, np.int32), np.array(labels, np.int32))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([-100, -100, 5, 6, -100], [2, 2, 1]), ([5, 6], [0, 2]), ([-100], [1]), ([5, -100, 5], [0, 1, 1, 1])],
)
def test_stretches_by_hand(labels: list[int], expected: list[int]) -> None:
    assert stretches(np.array(labels, np.int32)).tolist() == expected


TOKENS = st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(batches=st.lists(st.lists(TOKENS, max_size=4), min_size=1, max_size=4))
def test_what_is_written_comes_back(batches: list[list[list[tuple[int, bool]]]], tmp_path: Path) -> None:
    path = tmp_path / "tokens.arrow"
    writer = SequenceWriter(path)
    rows = []
    for batch in batches:
        made = [
            (_sequence([i for i, _ in tokens], [flag for _, flag in tokens]), len(tokens) % 2, f":{len(tokens)}")
            for tokens in batch
        ]
        writer.write(made)
        rows += made
    writer.close()
    dataset = TokenizedDataset.open(path, ["a.jsonl", "b.jsonl"], "key")
    assert len(dataset) == len(rows)
    assert dataset.lengths.tolist() == [len(sequence) for sequence, _, _ in rows]
    for i, (sequence, file, place) in enumerate(rows):
        assert dataset[i].input_ids.tolist() == sequence.input_ids.tolist()
        assert dataset[i].labels.tolist() == sequence.labels.tolist()
        assert dataset.source(i) == ["a.jsonl", "b.jsonl"][file] + place


@pytest.fixture
def dataset(tmp_path: Path) -> TokenizedDataset:
    """Ten sequences; number i has i + 1 tokens of the value i."""
    writer = SequenceWriter(tmp_path / "tokens.arrow")
    writer.write([(_sequence([i] * (i + 1), [True] * (i + 1)), 0, f":{i}") for i in range(10)])
    writer.close()
    return TokenizedDataset.open(tmp_path / "tokens.arrow", ["a"], "key")


def test_a_selection_has_its_own_order_and_fingerprint(dataset: TokenizedDataset) -> None:
    chosen = dataset.select([7, 2, 2])
    assert [chosen[i].input_ids.tolist() for i in range(3)] == [[7] * 8, [2] * 3, [2] * 3]
    assert chosen.lengths.tolist() == [8, 3, 3]
    assert chosen.source(0) == "a:7"
    again = chosen.select([2, 0])
    assert again.source(1) == "a:7"
    prints = [d.fingerprint for d in (dataset, chosen, again, dataset.select([2, 7]))]
    assert len(set(prints)) == 4
    assert dataset.select([7, 2, 2]).fingerprint == chosen.fingerprint


def test_numbers_out_of_range_are_errors(dataset: TokenizedDataset) -> None:
    with pytest.raises(IndexError):
        dataset[10]


def test_the_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    writer = SequenceWriter(tmp_path / "tokens.arrow")
    for _ in range(20):
        writer.write([(_sequence(list(range(1000)), [True] * 1000), 0, ":1") for _ in range(100)])
    writer.close()
    before = pa.total_allocated_bytes()
    dataset = TokenizedDataset.open(tmp_path / "tokens.arrow", ["a"], "key")
    assert dataset[1999].input_ids[-1] == 999
    assert (tmp_path / "tokens.arrow").stat().st_size > 8_000_000
    assert pa.total_allocated_bytes() - before < 100_000
