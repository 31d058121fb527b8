"""Text files as decoded lines or pieces: UTF-8 with or without a byte order mark, wrong bytes named by line.

Knows no format of the content. `name` is always the file as the user wrote it.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anima.errors import DataError

PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file: its values by key, and its place as it follows the file's name (`:12` or `: row 12`)."""

    values: dict[str, object]
    place: str


def _wrong_bytes(name: str, line: int, error: UnicodeDecodeError) -> DataError:
    wrong = error.object[error.start : error.end]
    utf16 = line == 1 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return DataError(
        "the file is not UTF-8",
        where=f"{name}:{line}",
        got=f"{'UTF-16' if utf16 else 'byte'} {wrong.hex(' ')} at byte {error.start + 1} of what was being read",
        allowed="UTF-8 text",
        fix="save the file as UTF-8",
    )


def text_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    r"""Line number from 1 and text with its line end; a line ends at \n only, as in JSON lines and CSV.

    Raises:
        DataError: A line is not UTF-8.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _wrong_bytes(name, number, error) from None
            yield number, line


def text_pieces(path: Path, name: str) -> Iterator[str]:
    """The text in pieces of about a mebibyte, wherever they end.

    Raises:
        DataError: The file is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with path.open("rb") as file:
        while raw := file.read(PIECE_BYTES):
            try:
                piece = decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise _wrong_bytes(name, line + error.object[: error.start].count(b"\n"), error) from None
            line += piece.count("\n")
            yield piece
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _wrong_bytes(name, line, error) from None
