"""Weights: how often a row occurs in an epoch, the same for everyone with the same seed, and never in two parts."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anima.config.schema import DataConfig
from anima.data.kinds import PAIRS
from anima.data.mixture import repeated
from anima.data.prepare import PreparedData, prepare, prepare_records
from anima.errors import DataError


@pytest.mark.parametrize(
    ("weight", "whole", "extra"), [(1, 1, 0), (2, 2, 0), (0.5, 0, 5), (1.25, 1, 3), (0.04, 0, 0), (3.99, 3, 10)]
)
def test_how_often_rows_occur(weight: float, whole: int, extra: int) -> None:
    rows = np.arange(100, 110)
    counts = Counter(repeated(rows, weight, 7, 0).tolist())
    assert sum(counts.values()) == 10 * whole + extra
    assert {counts[int(row)] for row in rows} <= {whole, whole + 1}


def test_the_seed_and_the_file_choose_the_rows() -> None:
    rows = np.arange(1000)
    chosen = [tuple(repeated(rows, 0.3, seed, file)) for seed, file in ((7, 0), (7, 0), (8, 0), (7, 1))]
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) == 3
    assert list(chosen[0]) == sorted(chosen[0])


@pytest.fixture
def run(tmp_path: Any, byte_tokenizer: Any, write_rows: Any) -> Callable[..., PreparedData[Any]]:
    def call(*weights: str, **options: Any) -> PreparedData[Any]:
        names = []
        for letter, weight in zip("ab", weights, strict=False):
            rows = [{"prompt": f"{letter}{i}", "completion": "x"} for i in range(10)]
            names.append(write_rows(rows, f"{letter}.jsonl") + weight)
        config = DataConfig(
            train_files=tuple(names),
            data_cache_dir=str(tmp_path / "cache"),
            data_workers=1,
            **options,
        )
        return prepare(config, byte_tokenizer(), seed=3)

    return call


def _files(data: Any) -> Counter[str]:
    return Counter(data.source(i).rpartition("/")[2].partition(".")[0] for i in range(len(data)))


def test_a_mixture_of_files(run: Any) -> None:
    data = run(":2", ":0.5")
    assert _files(data.train) == {"a": 20, "b": 5}
    assert data.report.train_rows == 25
    assert any("b.jsonl x 0.5: 5 of 10 an epoch" in line for line in data.report.lines())
    again = run(":2", ":0.5")
    assert again.report.train_cache.reused
    assert again.train.fingerprint == data.train.fingerprint != run(":2", ":0.6").train.fingerprint


def test_weights_of_one_change_nothing(run: Any) -> None:
    assert run(":1", "").train.fingerprint == run("", "").train.fingerprint
    assert run(":1", "").report.mixture == ()


def test_no_copy_of_a_held_out_row_is_trained_on(run: Any) -> None:
    data = run(":3", eval_size=4)
    assert _files(data.train) == {"a": 18}
    assert _files(data.eval) == {"a": 4}
    parts = [{part.source(i) for i in range(len(part))} for part in (data.train, data.eval)]
    assert not parts[0] & parts[1]


@pytest.mark.parametrize(
    ("weights", "options", "what"),
    [
        ((":0",), {}, "more than zero"),
        ((":0.04",), {}, "leaves no row"),
        (("",), {"eval_files": ("e.jsonl:2",)}, "only training data has weights"),
    ],
)
def test_weights_that_mean_nothing(weights: tuple[str, ...], options: dict[str, Any], what: str, run: Any) -> None:
    with pytest.raises(DataError, match=what):
        run(*weights, **options)


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path: Any, monkeypatch: Any) -> None:
    from anima.data.sources import resolve

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b:2.jsonl").write_text("")
    found = resolve(["a.jsonl:2", "b:2.jsonl", "b:2.jsonl:1.5", "owner/name:main:2", "owner/name[train:9]:3"][:2], "t")
    assert [(s.name, s.weight) for s in found] == [("a.jsonl", 2.0), ("b:2.jsonl", 1.0)]
    found = resolve(["b:2.jsonl:1.5", "owner/name:main:2", "owner/name[train:9]:3", "owner/name:2"], "t")
    assert [(s.name, s.weight) for s in found] == [
        ("b:2.jsonl", 1.5),
        ("owner/name:main", 2.0),
        ("owner/name[train:9]", 3.0),
        ("owner/name", 2.0),
    ]
    with pytest.raises(DataError, match="named twice") as caught:
        resolve(["a.jsonl", "a.jsonl:2"], "train_files")
    assert "a.jsonl:2" in str(caught.value.fix)


def test_a_mixture_of_pairs(tmp_path: Any, byte_tokenizer: Any, write_rows: Any) -> None:
    names = []
    for letter, weight in (("a", ":2"), ("b", ":0.5")):
        rows = [{"prompt": f"{letter}{i}", "chosen": "good", "rejected": "no"} for i in range(10)]
        names.append(write_rows(rows, f"{letter}.jsonl") + weight)
    config = DataConfig(train_files=tuple(names), data_cache_dir=str(tmp_path / "cache"), data_workers=1)
    train = prepare_records(PAIRS, config, byte_tokenizer(), seed=3).train
    assert _files(train) == {"a": 20, "b": 5}
    for i in (0, 7, 24):  # both sides of a pair stay together
        texts = [byte_tokenizer().decode(side.input_ids) for side in train[i]]
        assert texts[0].replace("good", "no") == texts[1]
