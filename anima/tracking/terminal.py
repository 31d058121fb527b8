"""What a terminal or a log file can show: width in columns, unprintable characters, wrapping, warnings.

Knows nothing of runs. Widths follow Unicode's East Asian Width (UAX 11), so Chinese text lines up.
"""

import sys
import unicodedata


def warn(text: str) -> None:
    """Print a warning on stderr; a log on a full disk or a closed pipe must not stop the training that warns."""
    try:
        print(f"warning: {text}", file=sys.stderr, flush=True)
    except OSError:
        return


def printable(text: str) -> str:
    r"""`text` with control characters written as escapes (`\x1b`), except newline and tab.

    Models write what they like; a sample must not move the cursor or ring the bell.
    """
    return "".join(char if char in "\n\t" or not _is_control(char) else ascii(char)[1:-1] for char in text)


def _is_control(char: str) -> bool:
    # Cs (half of a surrogate pair) cannot be encoded; bidirectional overrides (in Cf) would reorder the whole line.
    return unicodedata.category(char) in ("Cc", "Cs") or "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"


def char_width(char: str) -> int:
    """Columns that one character takes: 2 for wide and full-width ones, 0 for combining and invisible ones."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def text_width(text: str) -> int:
    """Columns that one line of text takes."""
    return sum(map(char_width, text))


def pad(text: str, columns: int) -> str:
    """`text` with spaces behind it up to `columns`; longer text is left as it is."""
    return text + " " * (columns - text_width(text))


def cut(text: str, columns: int) -> str:
    """The longest start of `text` that fits into `columns`."""
    used = 0
    for index, char in enumerate(text):
        used += char_width(char)
        if used > columns:
            return text[:index]
    return text


def wrap(text: str, columns: int) -> list[str]:
    """Lines of at most `columns`: broken at spaces, or between wide characters, or where a word is too long.

    Runs of blanks within a line become one space; newlines of `text` stay. At least one line; `columns` is 2 or more.
    """
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        line = ""
        for piece in _pieces(paragraph):
            candidate = f"{line}{piece}"
            if text_width(candidate.rstrip()) <= columns:
                line = candidate
                continue
            if line.strip():
                lines.append(line.rstrip())
            line = piece.lstrip()
            while text_width(line.rstrip()) > columns:
                head = cut(line, columns)
                lines.append(head)
                line = line[len(head) :]
        lines.append(line.rstrip())
    return lines


def _pieces(paragraph: str) -> list[str]:
    """Unbreakable pieces of a paragraph: words with the space behind them, wide characters one by one."""
    pieces: list[str] = []
    for word in paragraph.split():
        run = ""
        for char in word:
            if char_width(char) == 2 and not _closes(char):
                pieces += [run] if run else []
                run = char
            elif run and char_width(run[0]) == 2 and char_width(char) == 1 and not _closes(char):
                pieces.append(run)
                run = char
            else:
                run += char
        pieces.append(f"{run} ")
    return pieces


def _closes(char: str) -> bool:
    """Whether a line must not begin with `char`: closing brackets and punctuation, such as the Chinese full stop."""
    return unicodedata.category(char) in ("Pe", "Pf", "Po")
