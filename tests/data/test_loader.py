"""Steps as functions of (seed, number): the same rows on any number of ranks, each row as often as epochs say."""

import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest

from anima.data.batching import MicroBatch
from anima.data.dataset import SequenceWriter, TokenizedDataset
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.loader import EvalLoader, StepLoader

ROWS = 23


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenizedDataset:
    """Sequence i has i % 7 + 2 tokens of the value i, all but the first supervised."""
    path = tmp_path_factory.mktemp("loader") / "tokens.arrow"
    writer = SequenceWriter(path)
    for i in range(ROWS):
        ids = np.full(i % 7 + 2, i, np.int32)
        labels = ids.copy()
        labels[0] = IGNORE_INDEX
        writer.write([(TokenSequence(ids, labels), 0, f":{i + 1}")])
    writer.close()
    return TokenizedDataset.open(path, ["rows.jsonl"], "key")


def _loader(dataset: TokenizedDataset, rank: int = 0, world_size: int = 1, **changes: Any) -> StepLoader:
    options = {"global_batch_size": 5, "micro_batch_tokens": 16, "packing": True, "seed": 3, **changes}
    return StepLoader(dataset, rank=rank, world_size=world_size, **options)


def _rows(batches: list[MicroBatch]) -> list[int]:
    """Values of the documents that carry loss, one for each."""
    rows = []
    for batch in batches:
        if batch.num_scored:
            starts = batch.cu_seqlens[:-1].long()
            rows += batch.input_ids[0, starts].tolist()
    return rows


def test_each_epoch_holds_each_row_once(dataset: TokenizedDataset) -> None:
    loader = _loader(dataset)
    seen = [row for step in range(46) for row in loader.rows(step).tolist()]
    epochs = [seen[start : start + ROWS] for start in range(0, 10 * ROWS, ROWS)]
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


@pytest.mark.parametrize(
    ("epochs", "steps", "last"), [(1.0, 5, 3), (2.0, 10, 1), (5.0, 23, 5), (0.5, 3, 2), (0.01, 1, 1)]
)
def test_the_last_step_ends_with_the_epochs(dataset: TokenizedDataset, epochs: float, steps: int, last: int) -> None:
    loader = _loader(dataset)
    assert loader.num_steps(epochs) == steps
    rows = [loader.rows(step, num_train_epochs=epochs).tolist() for step in range(steps)]
    assert [len(r) for r in rows] == [5] * (steps - 1) + [last]
    counts = Counter(row for step in rows for row in step)
    if epochs == int(epochs):
        assert counts == dict.fromkeys(range(ROWS), int(epochs))
    with pytest.raises(IndexError):
        loader.rows(steps, num_train_epochs=epochs)
    with pytest.raises(IndexError):
        loader.rows(-1)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(dataset: TokenizedDataset, world_size: int, packing: bool) -> None:
    for step in (0, 4, 7):
        ranks = [_loader(dataset, rank, world_size, packing=packing).step(step) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = sorted(row for batches in ranks for row in _rows(batches))
        assert rows == sorted(_loader(dataset).rows(step).tolist())
        scored = sum(batch.num_scored for batches in ranks for batch in batches)
        assert scored == sum(row % 7 + 1 for row in rows)
        assert all(batch.input_ids.shape[1] <= 16 for batches in ranks for batch in batches)


def test_more_ranks_than_rows_are_filled_up(dataset: TokenizedDataset) -> None:
    ranks = [_loader(dataset, rank, 4).step(9, num_train_epochs=2.0) for rank in range(4)]
    assert [len(batches) for batches in ranks] == [1] * 4
    assert sorted(batches[0].num_scored > 0 for batches in ranks) == [False, False, False, True]


def test_a_step_depends_on_seed_and_number_only(dataset: TokenizedDataset) -> None:
    fresh, used = _loader(dataset), _loader(dataset)
    for step in (9, 0, 30):
        used.step(step)
    for one, other in zip(fresh.step(6), used.step(6), strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
    assert fresh.rows(6).tolist() != _loader(dataset, seed=4).rows(6).tolist()


def test_a_step_may_be_larger_than_the_set(dataset: TokenizedDataset) -> None:
    rows = _loader(dataset, global_batch_size=2 * ROWS).rows(0).tolist()
    assert Counter(rows) == dict.fromkeys(range(ROWS), 2)


def test_sources_and_epochs(dataset: TokenizedDataset) -> None:
    loader = _loader(dataset)
    assert loader.sources(4) == [f"rows.jsonl:{row + 1}" for row in loader.rows(4)]
    assert loader.epoch(0) == 0
    assert loader.epoch(46) == 10
    assert loader.epoch(1) == pytest.approx(5 / 23)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 30])
def test_evaluation_sees_every_row_once_in_order(dataset: TokenizedDataset, world_size: int, packing: bool) -> None:
    options: dict[str, Any] = {"micro_batch_tokens": 16, "packing": packing, "world_size": world_size}
    loaders = [EvalLoader(dataset, rank=rank, **options) for rank in range(world_size)]
    ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {len(loaders[0])}
    in_order = [batch for batches in zip(*ranks, strict=True) for batch in batches]
    assert _rows(in_order) == list(range(ROWS))
    fillers = sum(batch.num_scored == 0 for batch in in_order)
    assert fillers < world_size
    if packing and world_size == 1:
        assert len(in_order) < 12
    assert [b.input_ids.tolist() for b in loaders[0]] == [b.input_ids.tolist() for b in ranks[0]]


def test_evaluation_fills_a_micro_batch_to_the_last_token(dataset: TokenizedDataset) -> None:
    batches = list(EvalLoader(dataset, micro_batch_tokens=9, packing=True, rank=0, world_size=1))
    assert [batch.document_lengths for batch in batches[:6]] == [(2, 3, 4), (5,), (6,), (7,), (8,), (2, 3, 4)]


def test_what_the_configuration_forbids_is_a_bug(dataset: TokenizedDataset) -> None:
    with pytest.raises(ValueError, match="longer than a micro-batch"):
        EvalLoader(dataset, micro_batch_tokens=7, packing=True, rank=0, world_size=1)
    with pytest.raises(ValueError, match="without sequences"):
        _loader(dataset.select([]))
    with pytest.raises(ValueError, match="without sequences"):
        EvalLoader(dataset.select([]), micro_batch_tokens=7, packing=True, rank=0, world_size=1)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
def test_no_micro_batch_of_any_rank_is_heavier_than_the_heaviest(
    dataset: TokenizedDataset, world_size: int, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders = [_loader(dataset, rank, world_size, packing=packing) for rank in range(world_size)]
    loads = [sum(batch.document_lengths) for loader in loaders for step in range(9) for batch in loader.step(step)]
    heaviest = {sum(loader.heaviest(9).document_lengths) for loader in loaders}
    assert heaviest == {max(loads)}
    assert max(sum(b.document_lengths) for b in loaders[0].step(0)) <= sum(loaders[0].heaviest(1).document_lengths)
    # A run too long to be packed beforehand: a bound that keeps to the budget.
    monkeypatch.setattr("anima.data.loader.SEQUENCES_TO_PACK", 10)
    bound = sum(loaders[0].heaviest(9).document_lengths)
    assert max(loads) <= bound <= 16


def test_the_probe_is_the_same_for_any_ranks_and_budget(dataset: TokenizedDataset) -> None:
    probes = [_loader(dataset, rank, 2, micro_batch_tokens=budget).probe() for rank in (0, 1) for budget in (16, 40)]
    assert all(probe.input_ids.tolist() == probes[0].input_ids.tolist() for probe in probes)
    assert probes[0].num_scored == 1


def test_the_step_behind_is_prepared_by_a_thread(dataset: TokenizedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [_rows(_loader(dataset).step(step, num_train_epochs=1)) for step in range(5)]
    loader, here = _loader(dataset), []
    original = TokenizedDataset.batch

    def watched(self: TokenizedDataset, indices: Any) -> MicroBatch:
        here.append(threading.current_thread() is threading.main_thread())
        return original(self, indices)

    monkeypatch.setattr(TokenizedDataset, "batch", watched)
    seen = []
    for step in range(5):
        seen.append(_rows(loader.step(step, num_train_epochs=1)))
        loader._thread.submit(int).result()  # the thread is through with the step behind
    assert seen == plain
    assert here[0] is True
    assert here[-1] is False
    assert 0 < here.count(True) < here.count(False)  # only the first step was prepared when it was asked for
    with pytest.raises(IndexError, match="no step 5"):
        loader.step(5, num_train_epochs=1)
