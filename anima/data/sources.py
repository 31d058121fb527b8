"""What the user names as data (files, folders, globs, hub names), resolved to sources that stream rows.

Knows which reader a suffix takes; knows neither keys nor formats.
"""

import difflib
import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anima.data.hub import hub_fingerprint, is_hub_name, read_hub
from anima.data.json_rows import read_json, read_jsonl
from anima.data.table_rows import read_delimited, read_parquet
from anima.data.text_files import RawRow
from anima.errors import DataError

READERS: dict[str, Callable[[Path, str], Iterator[RawRow]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
    ".parquet": read_parquet,
}
SUFFIXES = tuple(READERS)
_FOREIGN_SUFFIXES = (".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".xlsx", ".yaml", ".yml", ".md")


@dataclass(frozen=True, slots=True)
class Source:
    """A local file (`path` is set) or a data set on the hub; `name` is what errors call it."""

    name: str
    path: Path | None

    def rows(self) -> Iterator[RawRow]:
        """All rows in order, read as one goes.

        Raises:
            DataError: A row or the file cannot be read.
        """
        if self.path is None:
            yield from read_hub(self.name)
            return
        try:
            yield from READERS[self.path.suffix.lower()](self.path, self.name)
        except OSError as error:
            raise DataError("the file cannot be read", where=self.name, got=error.strerror or str(error)) from None

    def content_hash(self) -> str:
        """sha256 of the file's bytes and suffix, or the hub's fingerprint: equal means equal rows.

        Raises:
            DataError: The file cannot be read, or the hub does not give the data set.
        """
        if self.path is None:
            return f"hub:{hub_fingerprint(self.name)}"
        try:
            with self.path.open("rb") as file:
                return f"{self.path.suffix.lower()}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        except OSError as error:
            raise DataError("the file cannot be read", where=self.name, got=error.strerror or str(error)) from None


def resolve(names: Sequence[str], flag: str) -> tuple[Source, ...]:
    """The sources behind the names of a flag, in order; folders and globs in order of their file names.

    Args:
        names: Files, folders, globs, hub names.
        flag: The flag they came from, for errors.

    Raises:
        DataError: Something is missing, of no readable kind, or named twice.
    """
    sources = [source for name in names for source in _resolve_one(name, flag)]
    seen: set[str] = set()
    for source in sources:
        identity = str(source.path.resolve()) if source.path is not None else source.name
        if identity in seen:
            raise DataError("the data is named twice", where=f"--{flag}", got=source.name, fix="name it once")
        seen.add(identity)
    return tuple(sources)


def _resolve_one(name: str, flag: str) -> list[Source]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and not p.name.startswith("."))
        return [_file(p, str(Path(name) / p.name), flag) for p in files] or _nothing(name, flag, "the folder")
    if path.exists():
        return [_file(path, name, flag)]
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(name) else []
    if matches:
        files = [Path(m) for m in matches if not Path(m).is_dir()]
        return [_file(p, str(p), flag) for p in files] or _nothing(name, flag, "the pattern")
    if is_hub_name(name, SUFFIXES + _FOREIGN_SUFFIXES) and not ("/" in name and path.parent.is_dir()):
        return [Source(name, None)]
    if glob.has_magic(name):
        return _nothing(name, flag, "the pattern")
    raise _missing(path, name, flag)


def _file(path: Path, name: str, flag: str) -> Source:
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"files of the kind {path.suffix!r} cannot be read" if path.suffix else "the file's name has no suffix",
            where=f"--{flag}",
            got=name,
            allowed=" ".join(SUFFIXES),
            fix="convert it to .jsonl, one object a line",
        )
    return Source(name, path)


def _nothing(name: str, flag: str, what: str) -> list[Source]:
    raise DataError(f"{what} holds no data", where=f"--{flag}", got=name, allowed=f"files {' '.join(SUFFIXES)}")


def _missing(path: Path, name: str, flag: str) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError("the file's folder does not exist", where=f"--{flag}", got=name, fix=f"look for {folder}")
    close = difflib.get_close_matches(path.name, sorted(p.name for p in folder.iterdir()), n=1)
    return DataError(
        "the file does not exist",
        where=f"--{flag}",
        got=name,
        allowed=f"files {' '.join(SUFFIXES)}, folders, globs, or hub names such as owner/name",
        fix=f"did you mean {folder / close[0]}?" if close else f"look into {folder}",
    )
