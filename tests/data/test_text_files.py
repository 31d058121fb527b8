"""Decoding: byte order marks, and the line of a wrong byte."""

from pathlib import Path

import pytest

from anima.data import text_files
from anima.data.text_files import text_lines, text_pieces
from anima.errors import DataError


def test_lines_end_at_newlines_only_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n" + "tw\u2028o\n三".encode())
    assert list(text_lines(path, "a.txt")) == [(1, "one\r\n"), (2, "tw\u2028o\n"), (3, "三")]
    assert "".join(text_pieces(path, "a.txt")) == "one\r\ntw\u2028o\n三"


@pytest.mark.parametrize("read", [text_lines, text_pieces])
@pytest.mark.parametrize(
    ("raw", "line"),
    [(b"one\ntwo\n\xff\n", 3), (b"one\ntwo\n\xe4\xb8", 3), (b"\xe4\xb8\nx", 1), ("hé\n".encode("latin-1"), 1)],
)
def test_a_wrong_byte_is_named_by_line(read: object, raw: bytes, line: int, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="not UTF-8") as caught:
        list(read(path, "data/a.txt"))  # type: ignore[operator]
    assert caught.value.where == f"data/a.txt:{line}"


def test_utf16_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("x".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        list(text_lines(path, "a.txt"))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_survive_every_cut(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PIECE_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff一é\n𝄞".encode())
    assert "".join(text_pieces(path, "a.txt")) == "一é\n𝄞"
    path.write_bytes(b"a\nb\n\xe4\xb8x")
    with pytest.raises(DataError) as caught:
        list(text_pieces(path, "a.txt"))
    assert caught.value.where == "a.txt:3"
