"""Every way a file can be broken that we know of: a message that names the place, or rows counted by reason.

Each case is run with both policies for bad rows; nothing may raise anything but a DataError, and no row may vanish.
"""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anima.config.schema import DataConfig
from anima.data.prepare import PreparedData, prepare
from anima.data.table_rows import read_parquet
from anima.errors import DataError

GOOD = '{"prompt": "a", "completion": "b"}\n'
PACKED = gzip.compress((GOOD * 2000).encode())
DEEP = '{"prompt": "a", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}\n"


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: Any) -> Callable[..., PreparedData[Any]]:
    def call(file: Path, **options: Any) -> PreparedData[Any]:
        config = DataConfig(
            train_files=(str(file),), data_cache_dir=str(tmp_path / "cache"), data_workers=1, chat_template="plain",
            **options,
        )  # fmt: skip
        return prepare(config, byte_tokenizer(), seed=1)

    return call


REFUSED: list[tuple[str, str, bytes, str, str]] = [
    # name, file, content, what the message says, what it tells to do or where it points
    ("empty", "a.jsonl", b"", "holds no rows", "write it again"),
    ("white space only", "a.jsonl", b"\n \n\t\n", "holds no rows", ""),
    ("header only", "a.csv", b"prompt,completion\n", "holds no rows", ""),
    ("UTF-16 of Excel", "a.csv", "prompt,completion\na,b\n".encode("utf-16"), "not UTF-8", "iconv -f UTF-16"),
    ("UTF-16 without its mark", "a.jsonl", GOOD.encode("utf-16-le"), "NUL bytes", "UTF-16"),
    ("UTF-16 list without its mark", "a.json", f"[{GOOD}]".encode("utf-16-le"), "NUL bytes", "UTF-16"),
    ("Windows-1252 table", "a.csv", "prompt,completion\ncafé,b\n".encode("cp1252"), "not UTF-8", "a.csv:2"),
    ("Latin-1 list", "a.json", '[{"prompt": "é", "completion": "b"}]'.encode("latin-1"), "not UTF-8", "a.json:1"),
    ("gzip without its name", "a.jsonl", PACKED, "not UTF-8", "name the file .gz"),
    ("gzip cut off", "a.jsonl.gz", PACKED[: len(PACKED) // 2], "gzip file is cut off", "write it again"),
    ("gzip with a flipped byte", "a.jsonl.gz", PACKED[:40] + b"\xff" + PACKED[41:], "gzip file is damaged", ""),
    ("no gzip", "a.jsonl.gz", GOOD.encode(), "gzip file is damaged", ""),
    ("list cut off", "a.json", f"[{GOOD},{GOOD[:20]}".encode(), "wrong JSON", "cut off"),
    ("list with a stray comma", "a.json", b'[{"prompt": "a", "completion": "b"},]', "wrong JSON", "a.json:1"),
    ("rows in a dictionary", "a.json", json.dumps({"data": []}, indent=1).encode(), "not a list", "between [ and ]"),
    ("quote not closed", "a.csv", b'prompt,completion\n"a,b\nc,d\n', "wrong table", "a.csv:2"),
    ("column named twice", "a.csv", b"prompt,prompt\na,b\n", "names the column 'prompt' twice", "a.csv:1"),
    ("no header", "a.csv", b"a,b\nc,d\n", "fits no known format", "a.csv:2"),
    ("line ends of an old Mac", "a.jsonl", (GOOD * 3).replace("\n", "\r").encode(), "wrong JSON", "\\r"),
    ("no parquet", "a.parquet", b"PAR1 and then nothing", "parquet file cannot be read", "cut off"),
    ("an Excel sheet", "a.xlsx", b"PK\x03\x04", "'.xlsx' cannot be read", "CSV UTF-8"),
    ("a text without turns", "a.txt", b"once", "'.txt' cannot be read", ".jsonl"),
]
COUNTED: list[tuple[str, str, bytes, str]] = [
    # name, file with two good rows and one bad one, reason; the bad row's line is the second good line of the file
    ("a line of Latin-1", "a.jsonl", '{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), "not UTF-8"),
    ("NUL bytes of a crash", "a.jsonl", b"\0" * 4096 + b"\n", "NUL bytes"),
    ("a line cut off", "a.jsonl", b'{"prompt": "a", "comple\n', "wrong JSON"),
    ("two objects in a line", "a.jsonl", GOOD.strip().encode() * 2 + b"\n", "wrong JSON"),
    ("a key given twice", "a.jsonl", b'{"prompt": "a", "prompt": "c", "completion": "b"}\n', "'prompt' twice"),
    ("no object", "a.jsonl", b'["a", "b"]\n', "row is not an object"),
    ("null instead of text", "a.jsonl", b'{"prompt": "a", "completion": null}\n', "completion is not text"),
    ("NaN instead of text", "a.jsonl", b'{"prompt": NaN, "completion": "b"}\n', "prompt is not text"),
    ("a number instead of text", "a.jsonl", b'{"prompt": "a", "completion": 3}\n', "completion is not text"),
    ("a missing key", "a.jsonl", b'{"prompt": "a", "answer": "b"}\n', "no key completion"),
    ("an empty answer", "a.jsonl", b'{"prompt": "a", "completion": " \\n"}\n', "answer is empty"),
    ("half a character", "a.jsonl", b'{"prompt": "a", "completion": "\\ud83d"}\n', "half a character"),
    ("nested too deeply", "a.jsonl", DEEP.encode(), "nested too deeply|completion is not text"),
    ("a control character not escaped", "a.jsonl", b'{"prompt": "a\tb", "completion": "b"}\n', "wrong JSON"),
    ("a row with too few cells", "a.csv", b"a\n", "1 cells, the header 2"),
    ("a row with too many cells", "a.csv", b"a,b,c\n", "3 cells, the header 2"),
]


@pytest.mark.parametrize(("file", "content", "what", "detail"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_files_that_are_refused(
    file: str, content: bytes, what: str, detail: str, bad_rows: str, run: Any, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        run(tmp_path / file, bad_rows=bad_rows)
    message = str(caught.value)
    if bad_rows == "error" or "left" not in message:
        assert what in message
        assert detail in message
    assert file in message


@pytest.mark.parametrize(("file", "bad", "what"), [c[1:] for c in COUNTED], ids=[c[0] for c in COUNTED])
def test_rows_that_are_refused_or_counted(file: str, bad: bytes, what: str, run: Any, tmp_path: Path) -> None:
    good = GOOD.encode() if file == "a.jsonl" else b"a,b\n"
    head = b"" if file == "a.jsonl" else b"prompt,completion\n"
    (tmp_path / file).write_bytes(head + good + bad + good)
    place = f"{tmp_path / file}:{2 if file == 'a.jsonl' else 3}"
    with pytest.raises(DataError, match=what) as caught:
        run(tmp_path / file)
    assert caught.value.where == place
    report = run(tmp_path / file, bad_rows="drop").report.train
    assert (report.rows, report.kept) == (3, 2)
    (tally,) = report.dropped.values()
    assert (tally.rows, tally.first) == (1, [place])


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
def test_a_damaged_parquet_file_gives_rows_or_a_message(compression: str, tmp_path: Path) -> None:
    table = pa.table({"prompt": [f"q{i} é" for i in range(300)], "completion": [f"a{i}" * 5 for i in range(300)]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression=compression)
    whole, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(2):
            if damaged:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert len(list(read_parquet(path, str(path)))) == 300
        except DataError:
            refused += 1
    assert refused > 10


def _rows(data: PreparedData[Any]) -> list[str]:
    return [data.train.source(i).rpartition("/")[2] for i in range(len(data.train))]


@pytest.mark.parametrize(
    ("file", "content", "places"),
    [
        ("bom.jsonl", b"\xef\xbb\xbf" + GOOD.encode() * 2, [":1", ":2"]),
        ("crlf.jsonl", GOOD.replace("\n", "\r\n").encode() * 2, [":1", ":2"]),
        ("no_end.jsonl", (GOOD * 2).strip().encode(), [":1", ":2"]),
        ("gaps.jsonl", (GOOD + "\n\r\n" + GOOD).encode(), [":1", ":4"]),
        ("named.json", (GOOD * 2).encode(), [":1", ":2"]),
        ("one_line.json", json.dumps([json.loads(GOOD)] * 2).encode(), [":1", ":1, row 2"]),
        ("excel.csv", b'\xef\xbb\xbfprompt;completion\r\n"a; b";b\r\na,c;b\r\n', [":2", ":3"]),
        ("excel_sep.csv", b"sep=;\r\nprompt;completion\r\na;b\r\na;b\r\n", [":3", ":4"]),
        ("tabs.csv", b"prompt\tcompletion\na, b\tb\na\tb\n", [":2", ":3"]),
        ("packed.jsonl.gz", gzip.compress(GOOD.encode() * 2), [":1", ":2"]),
        ("packed.csv.gz", gzip.compress(b"prompt,completion\na,b\na,b\n"), [":2", ":3"]),
        ("packed.json.gz", gzip.compress(json.dumps([json.loads(GOOD)] * 2, indent=1).encode()), [":2", ":6"]),
        ("parts.jsonl.gz", gzip.compress(GOOD.encode()) * 2, [":1", ":2"]),
    ],
)
def test_files_that_only_look_odd_are_read(
    file: str, content: bytes, places: list[str], run: Any, tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    assert _rows(run(tmp_path / file)) == [file + place for place in places]


def test_a_line_of_ten_megabytes(tmp_path: Path, smol_tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(GOOD + json.dumps({"prompt": "word " * 2_000_000, "completion": "b"}) + "\n" + GOOD)
    config = DataConfig(train_files=(str(file),), data_cache_dir=str(tmp_path / "cache"))
    report = prepare(config, smol_tokenizer, seed=1).report.train
    assert (report.rows, report.kept) == (3, 2)
    assert report.dropped["longer than max_seq_length"].first == [f"{file}:2"]


def test_a_file_whose_first_rows_fit_nothing(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"question": "a"}\nnot JSON\n' + GOOD)
    report = run(file, bad_rows="drop").report.train
    assert (report.rows, report.kept, sum(t.rows for t in report.dropped.values())) == (3, 1, 2)
    file.write_text('{"question": "a"}\n' * 3)
    with pytest.raises(DataError, match="fits no known format"):
        run(file, bad_rows="drop")


def test_many_kinds_of_bad_rows_are_counted_apart(run: Any, tmp_path: Path) -> None:
    bad = ['{"prompt": "a", "completion": ""}\n'] * 5 + ['{"prompt": "a"}\n'] * 2 + ["{\n"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(GOOD + line for line in bad))
    data = run(file, bad_rows="drop")
    counts = {reason: tally.rows for reason, tally in data.report.train.dropped.items()}
    assert sorted(counts.values()) == [1, 2, 5]
    assert data.report.train.kept == 8
    assert data.report.train.dropped["bad row: the answer is empty (completion)"].first == [
        f"{file}:{line}" for line in (2, 4, 6)
    ]
    assert any("the answer is empty (completion): 5" in line for line in data.report.lines())
