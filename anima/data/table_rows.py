"""Rows of `.csv`, `.tsv` and `.parquet`, streamed. Cells of text tables are text, whatever they look like.

The only reader of parquet; knows no meaning of a column.
"""

import csv
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from anima.data.text_files import OnBad, RawRow, refuse, text_lines
from anima.errors import DataError

PARQUET_ROWS = 256


def read_delimited(path: Path, name: str, delimiter: str, on_bad: OnBad = refuse) -> Iterator[RawRow]:
    """Rows of a table with a header line; quoted cells may hold line breaks. A row's line is the one it starts on.

    Where the header does not hold the separator but semicolons or tabs, these separate the cells (Excel in half of the
    world writes .csv so); a first line `sep=;`, as Excel reads it, is obeyed.

    Raises:
        DataError: Not UTF-8, a name twice in the header, a quote that is not closed; what `on_bad` raises for a row
            with more or fewer cells.
    """
    csv.field_size_limit(sys.maxsize)  # the library's 128 KiB for a cell is less than a long document
    lines, skipped, delimiter = _separator((line for _, line in text_lines(path, name)), delimiter)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1 + skipped
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"wrong table: {error}", where=f"{name}:{start}", fix="look for a quote that is not closed or doubled"
            ) from None
        if cells is None:
            return
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            continue
        if header is None:
            header = _checked_header(cells, f"{name}:{start}")
            continue
        if len(cells) != len(header):
            ragged = DataError(
                f"the row has {len(cells)} cells, the header {len(header)}",
                where=f"{name}:{start}",
                got=repr(cells)[:80],
                fix="quote cells that hold the separator",
            )
            on_bad(ragged, f":{start}")
            continue
        yield RawRow(dict(zip(header, cells, strict=True)), f":{start}")


def _separator(lines: Iterator[str], delimiter: str) -> tuple[Iterator[str], int, str]:
    """The lines of the table, how many stand before it, and what separates its cells."""
    first = next(lines, "")
    mark = first.strip()
    if len(mark) == 5 and mark.lower().startswith("sep="):
        return lines, 1, mark[4]
    if delimiter not in first:
        delimiter = next((other for other in (";", "\t") if other in first), delimiter)
    return chain([first], lines), 0, delimiter


def _checked_header(cells: list[str], where: str) -> list[str]:
    repeated = sorted({cell for cell in cells if cells.count(cell) > 1})
    if repeated:
        raise DataError(f"the header names the column {repeated[0]!r} twice", where=where, fix="rename one of them")
    return cells


def read_parquet(path: Path, name: str, on_bad: OnBad = refuse) -> Iterator[RawRow]:
    """Rows of a parquet file, counted from 1; all have the same columns, so `on_bad` is never called.

    Raises:
        DataError: Not a whole parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            footer = file.metadata
            promised = {footer.num_rows, sum(footer.row_group(i).num_rows for i in range(footer.num_row_groups))}
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield RawRow(values, f": row {number}")
        if promised != {number}:
            raise pa.ArrowInvalid(f"{number} rows, though it says {' and '.join(map(str, sorted(promised)))}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a damaged page is an OSError to pyarrow
        raise DataError(
            "the parquet file cannot be read",
            where=name if number == 0 else f"{name}: after row {number}",
            got=f"{type(error).__name__}: {error}".splitlines()[0],
            fix="write it again; it may be cut off or damaged",
        ) from error
