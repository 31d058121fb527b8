"""CSV, TSV and parquet: rows with their places, text stays text, wrong tables are named."""

from pathlib import Path
from typing import Any

import pytest

from anima.data.table_rows import read_delimited, read_parquet
from anima.errors import DataError


def _rows(path: Path, text: str, delimiter: str = ",") -> list[tuple[dict[str, Any], str]]:
    path.write_bytes(text.encode())
    return [(row.values, row.place) for row in read_delimited(path, path.name, delimiter)]


def test_rows_know_the_line_they_start_on(tmp_path: Path) -> None:
    text = '\ufeffprompt,completion\r\n"a\nb",c\r\n\r\n1,true\n"say ""hi""",\n'
    assert _rows(tmp_path / "a.csv", text) == [
        ({"prompt": "a\nb", "completion": "c"}, ":2"),
        ({"prompt": "1", "completion": "true"}, ":5"),
        ({"prompt": 'say "hi"', "completion": ""}, ":6"),
    ]


def test_tabs(tmp_path: Path) -> None:
    assert _rows(tmp_path / "a.tsv", "input\toutput\nx, y\tz\n", "\t") == [({"input": "x, y", "output": "z"}, ":2")]


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    assert len(_rows(tmp_path / "a.csv", "a,b\n" + "x" * 200_000 + ",y\n")[0][0]["a"]) == 200_000


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a,b\n1,2\n3\n", 3, "the row has 1 cells, the header 2"),
        ("a,b\n1,2,3\n", 2, "the row has 3 cells, the header 2"),
        ("a,a\n1,2\n", 1, "column 'a' twice"),
        ('a,b\n1,2\n"open,2\n3,4\n', 3, "wrong table"),
        ('a,b\n"x"y,2\n', 2, "wrong table"),
    ],
)
def test_wrong_tables_are_named_by_line(text: str, line: int, what: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=what) as caught:
        _rows(tmp_path / "a.csv", text)
    assert caught.value.where == f"a.csv:{line}"


def test_a_real_table_with_line_breaks_in_its_cells(shared_data_dir: Path) -> None:
    path = shared_data_dir / "pre_post_dpo_model_output_belle_eval_1k.csv"
    rows = list(read_delimited(path, path.name, ","))
    assert len(rows) == 1000
    lines = path.read_text("utf-8").split("\n")
    for number in (0, 1, 500, 999):  # the first cell of a row is its number
        assert lines[int(rows[number].place[1:]) - 1].startswith(f"{number},")


def test_parquet_rows_are_counted_from_one(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]] * 600
    pq.write_table(pa.table({"messages": chats, "n": range(600)}), path)
    rows = list(read_parquet(path, "a.parquet"))
    assert [row.place for row in rows] == [f": row {n}" for n in range(1, 601)]
    assert rows[599].values == {"messages": chats[0], "n": 599}


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, whatever the name says"])
def test_what_is_no_parquet_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match="parquet file cannot be read") as caught:
        list(read_parquet(path, "data/a.parquet"))
    assert caught.value.where == "data/a.parquet"
