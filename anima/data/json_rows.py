"""Rows of `.json` (a list of objects, or JSON lines by another name) and `.jsonl`, streamed, each with its line.

Strict: wrong JSON is named by line and column, a key given twice is an error. Knows no keys.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from anima.data.text_files import OnBad, RawRow, refuse, text_lines, text_pieces
from anima.errors import DataError

MAX_ROW_CHARS = 64 << 20
"""Longest row that is searched for its end; beyond, wrong JSON is reported instead of reading on."""


class _RepeatedKey(ValueError):
    pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _fault(error: Exception, name: str, line: int, column: int, got: str, cut_off: bool) -> DataError:
    """The user's view of what the JSON decoder raised."""
    if isinstance(error, json.JSONDecodeError):
        what = f"wrong JSON: {error.msg} (column {column})"
    elif isinstance(error, _RepeatedKey):
        what = f"an object holds the key {error.args[0]!r} twice"
    elif isinstance(error, RecursionError):
        what = "the JSON is nested too deeply"
    else:
        what = f"wrong JSON: {error}"
    fix = "the file seems to be cut off: write it again, or remove the last row" if cut_off else "mend this line"
    return DataError(what, where=f"{name}:{line}", got=got, fix=fix)


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 20])


def _as_row(value: object, name: str, line: int) -> RawRow:
    if not isinstance(value, dict):
        raise _no_object(value, name, line)
    return RawRow(value, f":{line}")


def _no_object(value: object, name: str, line: int) -> DataError:
    return DataError(
        "the row is not an object",
        where=f"{name}:{line}",
        got=f"{type(value).__name__} {repr(value)[:60]}",
        allowed='an object such as {"prompt": ..., "completion": ...}',
    )


def read_jsonl(path: Path, name: str, on_bad: OnBad = refuse) -> Iterator[RawRow]:
    """One object a line; lines of white space are passed over.

    Raises:
        DataError: What `on_bad` raises for a line that is not UTF-8, not JSON, or not an object.
    """
    for number, line in text_lines(path, name, on_bad):
        if line.isspace():
            continue
        try:
            row = _as_row(_parsed(line, name, number), name, number)
        except DataError as error:
            on_bad(error, f":{number}")
            continue
        yield row


def _parsed(line: str, name: str, number: int) -> object:
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        column = error.pos + 1 if isinstance(error, json.JSONDecodeError) else 1
        cut_off = not line.endswith("\n") and not line.rstrip().endswith("}")
        fault = _fault(error, name, number, column, _excerpt(line, column - 1), cut_off)
        if number == 1 and "\r" in line.rstrip("\r\n"):
            fault.fix = r"the lines seem to end in \r alone: convert them to \n (tr '\r' '\n')"
        raise fault from None


class _Stream:
    """A JSON text read piece by piece, and where in the file one is."""

    def __init__(self, path: Path, name: str) -> None:
        self._pieces = text_pieces(path, name)
        self._name = name
        self._text = ""
        self._position = 0
        self._line_start = 0
        self.line = 1

    def _read_more(self) -> bool:
        """Drop what is behind, double what is ahead (so that a long row is not parsed anew for every piece)."""
        wanted = max(1, len(self._text) - self._position)
        added: list[str] = []
        while sum(map(len, added)) < wanted and (piece := next(self._pieces, None)) is not None:
            added.append(piece)
        if not added:
            return False
        self._line_start -= self._position
        self._text, self._position = self._text[self._position :] + "".join(added), 0
        return True

    def _advance(self, position: int) -> None:
        self.line += self._text.count("\n", self._position, position)
        newline = self._text.rfind("\n", self._position, position)
        if newline >= 0:
            self._line_start = newline + 1
        self._position = position

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            position = self._position
            while position < len(self._text) and self._text[position] in " \t\r\n":
                position += 1
            self._advance(position)
            if position < len(self._text):
                return self._text[position]
            if not self._read_more():
                return ""

    def skip(self) -> None:
        self._advance(self._position + 1)

    def value(self) -> object:
        """The JSON value that starts here."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                located = isinstance(error, json.JSONDecodeError)
                if located and len(self._text) - self._position < MAX_ROW_CHARS and self._read_more():
                    continue
                at = error.pos if isinstance(error, json.JSONDecodeError) else self._position
                cut_off = located and not self._text.rstrip().endswith(("]", "}"))
                self._advance(at)
                column = at - self._line_start + 1
                raise _fault(error, self._name, self.line, column, _excerpt(self._text, at), cut_off) from None
            self._advance(end)
            return value

    def fail(self, what: str, fix: str) -> DataError:
        column = self._position - self._line_start + 1
        return DataError(
            f"wrong JSON: {what} (column {column})",
            where=f"{self._name}:{self.line}",
            got=_excerpt(self._text, self._position),
            fix=fix,
        )


def read_json(path: Path, name: str, on_bad: OnBad = refuse) -> Iterator[RawRow]:
    """A list of objects; also JSON lines, told by a first line that is one whole object.

    Raises:
        DataError: Not UTF-8, not JSON, a top level that is no list; what `on_bad` raises for a row that is no object.
    """
    stream = _Stream(path, name)
    first = stream.peek()
    if first == "":
        return
    if first == "[":
        yield from _read_list(stream, name, on_bad)
        return
    start = stream.line
    top = stream.value()
    end = stream.line
    alone_on_its_line = start == end and (stream.peek() == "" or stream.line > end)
    if isinstance(top, dict) and alone_on_its_line:
        yield from read_jsonl(path, name, on_bad)
        return
    raise DataError(
        "the top level of the file is not a list",
        where=f"{name}:{start}",
        got=f"{type(top).__name__} {repr(top)[:60]}",
        allowed="a list of objects, or one object a line",
        fix="put the rows between [ and ], separated by commas",
    )


def _read_list(stream: _Stream, name: str, on_bad: OnBad) -> Iterator[RawRow]:
    stream.skip()
    if stream.peek() == "]":
        stream.skip()
    else:
        before, number = 0, 0
        while True:
            stream.peek()
            line = stream.line
            number += 1
            place = f":{line}" if line != before else f":{line}, row {number}"  # several rows on one line
            before = line
            value = stream.value()
            if isinstance(value, dict):
                yield RawRow(value, place)
            else:
                on_bad(_no_object(value, name, line), place)
            mark = stream.peek()
            if mark not in (",", "]"):
                what = "the file ends before the list does" if mark == "" else "a comma or ] is missing after a row"
                raise stream.fail(what, "write the file again: it may be cut off" if mark == "" else "mend this place")
            stream.skip()
            if mark == "]":
                break
    if stream.peek() != "":
        raise stream.fail("there is text after the end of the list", "keep one list in the file")
