"""What names resolve to, and what is said when they do not."""

import gzip
import os
from pathlib import Path

import pytest

from anima.data.sources import resolve
from anima.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `data` in the current one, with a few files."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("b.jsonl", "a.json", "c.CSV", ".hidden.json", "readme.md"):
        (data / name).write_text('[{"a": 1}]' if name.endswith("json") else "")
    return data


def _names(*names: str) -> list[str]:
    return [source.name for source in resolve(names, "train_files")]


def test_files_folders_and_globs(folder: Path) -> None:
    assert _names("data/b.jsonl") == ["data/b.jsonl"]
    assert _names("data") == ["data/a.json", "data/b.jsonl", "data/c.CSV"]
    assert _names("data/*.json*", "data/c.CSV") == ["data/a.json", "data/b.jsonl", "data/c.CSV"]
    assert _names("**/b.jsonl") == ["data/b.jsonl"]


def test_packed_files_are_files_of_their_kind(folder: Path) -> None:
    (folder / "d.jsonl.GZ").write_bytes(gzip.compress(b'{"a": 1}\n'))
    (folder / "e.gz").write_bytes(b"")
    assert _names("data")[-1] == "data/d.jsonl.GZ"
    assert [row.values for row in resolve(["data/d.jsonl.GZ"], "t")[0].rows()] == [{"a": 1}]
    with pytest.raises(DataError, match=r"the kind '.gz' cannot be read"):
        resolve(["data/e.gz"], "train_files")


def test_a_home_folder_is_understood(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    source = resolve(["~/a.json"], "train_files")[0]
    assert source.path == folder / "a.json"
    assert [row.values for row in source.rows()] == [{"a": 1}]


def test_only_what_cannot_be_a_file_is_a_hub_name(folder: Path) -> None:
    assert resolve(["tatsu-lab/alpaca", "imdb[test]"], "train_files")[1].path is None
    with pytest.raises(DataError, match="does not exist"):
        resolve(["data/a"], "train_files")


@pytest.mark.parametrize(
    ("name", "what", "detail"),
    [
        ("data/a.jsn", "does not exist", "did you mean data/a.json?"),
        ("data/b.jsonL", "does not exist", "did you mean data/b.jsonl?"),
        ("nowhere/a.json", "folder does not exist", "nowhere"),
        ("data/*.parquet", "pattern holds no data", "data/*.parquet"),
        ("data/readme.md", "'.md' cannot be read", ".json .jsonl .csv .tsv .parquet"),
        ("empty", "folder holds no data", "empty"),
        ("data/x.json.gz", "does not exist", ""),
        ("~nobody-of-this-name/a.json", "folder does not exist", "~nobody-of-this-name"),
        ("n" * 300 + ".json", "cannot be read", "File name too long"),
    ],
)
def test_what_cannot_be_found_is_explained(name: str, what: str, detail: str, folder: Path) -> None:
    (folder.parent / "empty").mkdir()
    with pytest.raises(DataError, match=what) as caught:
        resolve([name], "eval_files")
    assert caught.value.where == "--eval_files"
    assert detail in str(caught.value)


def test_data_named_twice_is_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match="named twice"):
        resolve(["data/a.json", str(folder / "*.json")], "train_files")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / "a.json").chmod(0)
    source = resolve(["data/a.json"], "train_files")[0]
    with pytest.raises(DataError, match="cannot be read"):
        list(source.rows())
    with pytest.raises(DataError, match="cannot be read"):
        source.content_hash()


def test_the_hash_follows_content_and_kind_but_not_the_name(folder: Path) -> None:
    def content_hash(name: str, text: str) -> str:
        (folder / name).write_text(text)
        return resolve([f"data/{name}"], "train_files")[0].content_hash()

    assert content_hash("x.csv", "a,b\n") == content_hash("y.csv", "a,b\n")
    assert content_hash("x.csv", "a,b\n") != content_hash("x.tsv", "a,b\n")
    assert content_hash("x.csv", "a,b\n") != content_hash("y.csv", "a,c\n")
