"""Hub names: what looks like one, what is asked of the hub, and what its absence is called."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from anima.config.schema import DataConfig
from anima.data import hub
from anima.data.hub import hub_fingerprint, is_hub_name, read_hub
from anima.data.prepare import prepare
from anima.errors import DataError

SUFFIXES = (".json", ".jsonl")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    hub._load.cache_clear()
    yield
    hub._load.cache_clear()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tatsu-lab/alpaca", True),
        ("imdb", True),
        ("owner/name:config[validation]", True),
        ("owner/name[test]", True),
        ("owner/name:config[train:1000]", True),
        ("owner/name[train:0]", False),
        ("owner/data.jsonl", False),
        ("data.JSON", False),
        ("./name", False),
        ("../name", False),
        ("a/b/c", False),
        ("data/*.parquet", False),
        ("", False),
    ],
)
def test_hub_names(text: str, expected: bool) -> None:
    assert is_hub_name(text, SUFFIXES) is expected


def test_rows_of_a_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_dict({"prompt": ["P", "Q"], "completion": ["C", "D"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_hub("owner/name:small[test]"))
    assert [(row.values, row.place) for row in rows] == [
        ({"prompt": "P", "completion": "C"}, ": row 1"),
        ({"prompt": "Q", "completion": "D"}, ": row 2"),
    ]
    assert hub_fingerprint("owner/name:small[test]")
    list(read_hub("other"))
    assert asked == [("owner/name", "small", "test"), ("other", None, "train")]


def test_streaming_reads_row_by_row_and_knows_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((path, config, split, streaming))

        def rows() -> Iterator[dict[str, object]]:
            for number in range(10**9):  # larger than any memory
                yield {"prompt": f"P{number}", "completion": "C"}

        return datasets.IterableDataset.from_generator(rows)

    class Builder:
        hash = "0123abcd"

        class config:
            name = "default"

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, config: Builder())
    rows = read_hub("owner/large", streaming=True)
    assert [next(rows).values["prompt"] for _ in range(3)] == ["P0", "P1", "P2"]
    assert len(list(read_hub("owner/large[train:5]", streaming=True))) == 5
    assert asked == [("owner/large", None, "train", True)] * 2
    names = ("owner/large", "owner/large[train:5]", "owner/large[train:6]", "owner/large[test]")
    assert len({hub_fingerprint(name, streaming=True) for name in names}) == 4
    assert "0123abcd" in hub_fingerprint("owner/large", streaming=True)


def test_a_streamed_set_becomes_tokens(monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Any, tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, object]]:
        yield from ({"prompt": f"P{number}", "completion": "C"} for number in range(700))

    streamed = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: streamed)
    monkeypatch.setattr(hub, "_streamed_revision", lambda name: "revision")
    config = DataConfig(train_files=("owner/large",), data_cache_dir=str(tmp_path), hub_streaming=True)
    data = prepare(config, byte_tokenizer(), seed=1)
    assert len(data.train) == 700
    assert data.train.source(699) == "owner/large: row 700"


def test_a_connection_that_breaks_names_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict[str, object]]:
        yield {"prompt": "P", "completion": "C"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows())
    with pytest.raises(DataError, match="cannot be reached any more") as caught:
        list(read_hub("owner/name", streaming=True))
    assert caught.value.where == "owner/name: after row 1"


def test_no_network_names_the_way_out() -> None:
    """With HF_HUB_OFFLINE=1, in a process of its own because the library reads it when it is imported."""
    code = (
        "from anima.data.hub import read_hub\nfrom anima.errors import DataError\n"
        "try:\n    list(read_hub('nobody/nothing:small'))\nexcept DataError as error:\n    print(error)\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert "where:   nobody/nothing:small" in done.stdout
    assert "datasets.load_dataset('nobody/nothing', 'small')" in done.stdout
    assert "HF_HUB_OFFLINE=1" in done.stdout
    assert "login node" in done.stdout


@pytest.mark.parametrize(
    "error",
    [
        ValueError('Unknown split "x"'),
        datasets.exceptions.DatasetNotFoundError("gone"),
        FileNotFoundError("f"),
        OSError("Not enough disk space."),
        RuntimeError("Dataset scripts are no longer supported, but found name.py"),
    ],
)
def test_what_the_hub_does_not_give(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="the hub does not give it") as caught:
        list(read_hub("owner/name[x]"))
    assert caught.value.where == "owner/name[x]"
    assert caught.value.got == str(error)


def test_a_hub_that_falls_silent_before_it_names_the_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter(()))
    monkeypatch.setattr(datasets, "load_dataset_builder", lost)
    with pytest.raises(DataError, match="the hub cannot be reached") as caught:
        hub_fingerprint("owner/name", streaming=True)
    assert caught.value.got == "ConnectionError"
