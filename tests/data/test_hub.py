"""Hub names: what looks like one, what is asked of the hub, and what its absence is called."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import datasets
import pytest

from anima.data import hub
from anima.data.hub import hub_fingerprint, is_hub_name, read_hub
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
    "error", [ValueError('Unknown split "x"'), datasets.exceptions.DatasetNotFoundError("gone"), FileNotFoundError("f")]
)
def test_what_the_hub_does_not_give(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="the hub does not give it") as caught:
        list(read_hub("owner/name[x]"))
    assert caught.value.where == "owner/name[x]"
    assert caught.value.got == str(error)
