"""JSON lists and JSON lines: rows with their lines, and every way a file can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anima.data import text_files
from anima.data.json_rows import read_json, read_jsonl
from anima.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
ROWS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=6)


def _rows(path: Path, text: str, reader: Any = read_json) -> list[tuple[dict[str, Any], str]]:
    path.write_text(text, "utf-8")
    return [(row.values, row.place) for row in reader(path, path.name)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(rows=ROWS, indent=st.sampled_from([None, 0, 2]), size=st.sampled_from([1, 5, 64, 1 << 20]))
def test_any_list_is_read_as_the_json_library_does(
    rows: list[dict[str, Any]], indent: int | None, size: int, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE_BYTES", size)
        assert [row for row, _ in _rows(tmp_path / "a.json", json.dumps(rows, indent=indent))] == rows
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        as_utf8 = lines.encode("utf-8", "surrogatepass")
        (tmp_path / "a.jsonl").write_bytes(as_utf8)
        assert [row.values for row in read_jsonl(tmp_path / "a.jsonl", "a.jsonl")] == rows


def test_rows_know_the_line_they_start_on(tmp_path: Path) -> None:
    text = '\n[\n  {"a": "x\\ny"},\n  {\n    "a": 2\n  }, {"a": 3}\n]\n'
    assert _rows(tmp_path / "a.json", text) == [({"a": "x\ny"}, ":3"), ({"a": 2}, ":4"), ({"a": 3}, ":6")]
    lines = '{"a": 1}\n\n  \n{"a": 2}'
    assert _rows(tmp_path / "a.jsonl", lines, read_jsonl) == [({"a": 1}, ":1"), ({"a": 2}, ":4")]


@pytest.mark.parametrize("text", ['{"a": 1}\n{"a": 2}\n', '\n{"a": 1}\n{"a": 2}'])
def test_json_lines_in_a_json_file_are_noticed(text: str, tmp_path: Path) -> None:
    assert [row for row, _ in _rows(tmp_path / "a.json", text)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] "])
def test_nothing_gives_no_rows(text: str, tmp_path: Path) -> None:
    assert _rows(tmp_path / "a.json", text) == []


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"a": 1},\n {"a" 2}]', 2, r"wrong JSON: Expecting ':' delimiter \(column 7\)"),
        ('[{"a": 1}\n {"a": 2}]', 2, r"comma or \] is missing after a row \(column 2\)"),
        ('[{"a": 1},\n]', 2, r"Expecting value \(column 1\)"),
        ('[{"a": 1},\n{"a": "tw', 2, r"Unterminated string.*\(column 7\)"),
        ('[{"a": 1},\n{"a": 2}\n', 3, "file ends before the list does"),
        ('[{"a": 1}]\n[]', 2, "text after the end of the list"),
        ('[{"a": 1},\n 3]', 2, "row is not an object"),
        ('[{"a": 1, "b": 2,\n "a": 3}]', 1, "holds the key 'a' twice"),
        ('[{"a": [{"b": 1, "b": 1}]}]', 1, "holds the key 'b' twice"),
        ('{\n"data": []}', 1, "top level of the file is not a list"),
        ('{"data": []} {"data": []}', 1, "top level of the file is not a list"),
        ("3\n", 1, "top level of the file is not a list"),
        ('{"a": 1}\n{"a": }\n', 2, r"Expecting value \(column 7\)"),
        ('{"a": 1}\n[1]\n', 2, "row is not an object"),
        ("[" * 100_000, 1, "row is not an object|nested too deeply"),
        ('[{"a": ' + "[" * 100_000, 1, "nested too deeply"),
        ('[{"a": ' + "9" * 5000 + "}]", 1, "wrong JSON: Exceeds the limit"),
    ],
)
@pytest.mark.parametrize("size", [4, 1 << 20])
def test_wrong_lists_are_named_by_line(
    text: str, line: int, what: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", max(size, len(text) // 100))
    with pytest.raises(DataError, match=what) as caught:
        _rows(tmp_path / "a.json", text)
    assert caught.value.where == f"a.json:{line}"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('{"a": 1}\n{"a": 2\n', 2, r"wrong JSON: Expecting ',' delimiter \(column 9\)"),
        ('{"a": 1}\n{"a": 2} {"a": 3}\n', 2, r"Extra data \(column 10\)"),
        ('{"a": 1}\n\n"text"\n', 3, "row is not an object"),
        ('{"a": 1, "a": 1}', 1, "key 'a' twice"),
    ],
)
def test_wrong_lines_are_named(text: str, line: int, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        _rows(tmp_path / "a.jsonl", text, read_jsonl)
    assert caught.value.where == f"a.jsonl:{line}"


def test_a_file_that_was_cut_off_is_called_so(tmp_path: Path) -> None:
    for name, text, reader in (
        ("a.jsonl", '{"a": 1}\n{"a": "tw', read_jsonl),
        ("a.json", '[{"a": 1}, {"a": "tw', read_json),
    ):
        with pytest.raises(DataError) as caught:
            _rows(tmp_path / name, text, reader)
        assert "cut off" in str(caught.value.fix)


def test_rows_come_before_the_rest_of_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", 64)
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, ' + '{"a": 2}, ' * 1000 + "oops]", "utf-8")
    rows = read_json(path, "a.json")
    assert [next(rows).values["a"] for _ in range(900)] == [1] + [2] * 899
    with pytest.raises(DataError):
        list(rows)


def test_every_row_of_a_real_list_has_its_line(shared_data_dir: Path) -> None:
    path = shared_data_dir / "alpaca_zh_demo.json"
    lines = path.read_text("utf-8").split("\n")
    rows = list(read_json(path, path.name))
    assert [row.values for row in rows] == json.loads(path.read_text("utf-8"))
    for row in rows[::97]:
        line = int(row.place[1:])
        assert lines[line - 1].strip() == "{"
        assert json.dumps(row.values["instruction"], ensure_ascii=False) in lines[line]
