"""The rows of all files of a set, in order, in batches of one layout; rows that cannot be read are counted.

Finds out the layout of a file from its first row. Knows neither templates nor tokens.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from anima.config.schema import DataConfig
from anima.data.formats import Row
from anima.data.report import SetReport
from anima.data.row_work import BAD_ROW, RowBatch
from anima.data.sources import Source
from anima.data.text_files import RawRow, reason_of, refuse
from anima.errors import DataError

BATCH_ROWS = 256
_LOG_ROWS = 100_000

logger = logging.getLogger(__name__)

Detect = Callable[[Row, str], str]


def row_batches(config: DataConfig, detect: Detect, sources: Sequence[Source], report: SetReport) -> Iterator[RowBatch]:
    """Batches of all rows.

    Args:
        config: Its layout and its policy for bad rows.
        detect: (row, source) -> the name of its layout.
        sources: The files, in order.
        report: Counts the rows that are dropped here; those in the batches are counted by whoever works on them.

    Raises:
        DataError: A file cannot be used; a row cannot be read and the policy is to stop.
    """
    read = 0
    for number, source in enumerate(sources):
        for batch in _batches_of(config, detect, number, source, report):
            if (read + len(batch.rows)) // _LOG_ROWS > read // _LOG_ROWS:
                logger.info("%s rows read", f"{read + len(batch.rows):,}")
            read += len(batch.rows)
            yield batch


def _batches_of(
    config: DataConfig, detect: Detect, number: int, source: Source, report: SetReport
) -> Iterator[RowBatch]:
    before, found = report.rows, False

    def drop(error: DataError, place: str) -> None:
        report.rows += 1
        report.drop(BAD_ROW + reason_of(error), number, place)

    on_bad = drop if config.bad_rows == "drop" else refuse
    layout = "" if config.dataset_format == "auto" else str(config.dataset_format)
    unfit: DataError | None = None
    collected: list[RawRow] = []
    batch = partial(RowBatch, number, source.name)
    for row in source.rows(on_bad):
        if not layout:
            try:
                layout = detect(row.values, source.name + row.place)
            except DataError as error:
                on_bad(error, row.place)
                unfit = unfit or error
                continue
        found = True
        collected.append(row)
        if len(collected) == BATCH_ROWS:
            yield batch(layout, collected)
            collected = []
    if collected:
        yield batch(layout, collected)
    if not found and unfit is not None:
        raise unfit
    if not found and report.rows == before:
        raise DataError("the file holds no rows", where=source.name, fix="leave it out, or write it again")
