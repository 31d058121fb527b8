"""Text files as decoded lines or pieces: UTF-8 with or without a byte order mark, plain or gzip, wrong bytes named by
line. Knows no format of the content. `name` is always the file as the user wrote it.
"""

import codecs
import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn, cast

from anima.errors import DataError

PIECE_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OTHER_FILES = (*_UTF16_MARKS, GZIP_MAGIC)
"""First bytes of files that hold no line of UTF-8 at all."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file: its values by key, and its place as it follows the file's name (`:12` or `: row 12`)."""

    values: dict[str, object]
    place: str


OnBad = Callable[[DataError, str], None]
"""Told of a row that cannot be used (why, and its place); returns if the reader shall go on with the next row."""


def refuse(error: DataError, place: str) -> NoReturn:
    """The OnBad that stops at the first row that cannot be used."""
    raise error


def reason_of(error: DataError) -> str:
    """The kind of mistake, for counting: what is wrong, without the numbers of this one row."""
    return re.sub(r" ?\(column \d+\)", "", re.sub(r"\[\d+\]", "[…]", error.what))


def wrong_bytes(name: str, line: int, error: UnicodeDecodeError) -> DataError:
    """The error for text that is not UTF-8, with what it seems to be instead."""
    wrong = error.object[error.start : error.end]
    fix = "save the file as UTF-8 (Excel: the file type CSV UTF-8)"
    seems = "byte"
    if line == 1 and error.object[:2] in _UTF16_MARKS:
        seems, fix = "UTF-16", f"{fix}; or: iconv -f UTF-16 -t UTF-8 {name} > NEW"
    elif line == 1 and error.object[:2] == GZIP_MAGIC:
        seems, fix = "gzip", "name the file .gz, or unpack it"
    return DataError(
        "the file is not UTF-8",
        where=f"{name}:{line}",
        got=f"{seems} {wrong.hex(' ')} at byte {error.start + 1} of what was being read",
        allowed="UTF-8 text",
        fix=fix,
    )


@contextmanager
def open_bytes(path: Path, name: str) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked if its name ends in .gz.

    Raises:
        DataError: The packed file is cut off or damaged.
    """
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as packed:
            yield cast(IO[bytes], packed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        cut_off = isinstance(error, EOFError)
        raise DataError(
            "the gzip file is cut off" if cut_off else "the gzip file is damaged",
            where=name,
            got=str(error),
            fix="copy or write it again: what follows the break cannot be read",
        ) from None


def text_lines(path: Path, name: str, on_bad: OnBad = refuse) -> Iterator[tuple[int, str]]:
    r"""Line number from 1 and text with its line end; a line ends at \n only, as in JSON lines and CSV.

    Raises:
        DataError: The packed file is damaged; what `on_bad` raises for a line that is not UTF-8 or holds NUL bytes.
    """
    with open_bytes(path, name) as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if number == 1 and raw.startswith(_OTHER_FILES):
                    raise wrong_bytes(name, number, error) from None
                on_bad(wrong_bytes(name, number, error), f":{number}")
                continue
            if "\0" in line:
                on_bad(_nul_bytes(name, number, line), f":{number}")
                continue
            yield number, line


def text_pieces(path: Path, name: str) -> Iterator[str]:
    """The text in pieces of about a mebibyte, wherever they end.

    Raises:
        DataError: The file is not UTF-8, or holds NUL bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    with open_bytes(path, name) as file:
        while raw := file.read(PIECE_BYTES):
            try:
                piece = decoder.decode(raw)
            except UnicodeDecodeError as error:
                raise wrong_bytes(name, line + error.object[: error.start].count(b"\n"), error) from None
            if "\0" in piece:
                raise _nul_bytes(name, line + piece[: piece.index("\0")].count("\n"), piece)
            line += piece.count("\n")
            yield piece
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise wrong_bytes(name, line, error) from None


def _nul_bytes(name: str, line: int, text: str) -> DataError:
    every_second = text.count("\0") * 3 > len(text)
    return DataError(
        "the text holds NUL bytes",
        where=f"{name}:{line}",
        got=f"{text.count(chr(0))} of {len(text)} characters",
        allowed="UTF-8 text",
        fix="the file seems to be UTF-16: save it as UTF-8"
        if every_second
        else "write the file again: it may come from a crash or a full disk",
    )
