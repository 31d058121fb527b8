"""What the user names as data (files, folders, globs, hub names, each perhaps with a weight), resolved to sources that
stream rows. Knows which reader a suffix takes; knows neither keys nor formats.
"""

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from anima.data.file_hash import file_hash
from anima.data.hub import hub_fingerprint, is_hub_name, read_hub
from anima.data.json_rows import read_json, read_jsonl
from anima.data.table_rows import read_delimited, read_parquet
from anima.data.text_files import OnBad, RawRow, refuse
from anima.errors import DataError


class Reader(Protocol):
    """Reads the rows of a file: its path, its name for errors, and who is told of rows that cannot be used."""

    def __call__(self, path: Path, name: str, *, on_bad: OnBad) -> Iterator[RawRow]: ...


_TEXT_READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": partial(read_delimited, delimiter=","),
    ".tsv": partial(read_delimited, delimiter="\t"),
}
READERS: dict[str, Reader] = {
    **_TEXT_READERS,
    ".parquet": read_parquet,
    **{f"{suffix}.gz": reader for suffix, reader in _TEXT_READERS.items()},
}
SUFFIXES = tuple(READERS)
_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>\d+(\.\d+)?)")
_FOREIGN_SUFFIXES = (".txt", ".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".xlsx", ".yaml", ".yml", ".md")


@dataclass(frozen=True, slots=True)
class Source:
    """A local file (`path` is set) or a data set on the hub; `name` is what errors call it.

    weight: how often each row occurs in an epoch. streaming: a hub set is read from the network, not stored.
    """

    name: str
    path: Path | None
    weight: float = 1.0
    streaming: bool = False

    def rows(self, on_bad: OnBad = refuse) -> Iterator[RawRow]:
        """All rows in order, read as one goes.

        Args:
            on_bad: Told of rows that cannot be read; the default stops at the first one.

        Raises:
            DataError: The file cannot be read, or what `on_bad` raises.
        """
        if self.path is None:
            yield from read_hub(self.name, streaming=self.streaming)
            return
        try:
            yield from READERS[_suffix(self.path)](self.path, self.name, on_bad=on_bad)
        except OSError as error:
            raise DataError("the file cannot be read", where=self.name, got=error.strerror or str(error)) from None

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """sha256 of the file's bytes and suffix, or the hub's fingerprint: equal means equal rows.

        Args:
            cache_dir: Folder that remembers the hashes of large files; None reads every file.

        Raises:
            DataError: The file cannot be read, or the hub does not give the data set.
        """
        if self.path is None:
            return f"hub:{hub_fingerprint(self.name, streaming=self.streaming)}"
        try:
            return f"{_suffix(self.path)}:{file_hash(self.path, cache_dir)}"
        except OSError as error:
            raise DataError("the file cannot be read", where=self.name, got=error.strerror or str(error)) from None


def resolve(names: Sequence[str], flag: str, *, weights: bool = True, streaming: bool = False) -> tuple[Source, ...]:
    """The sources behind the names of a flag, in order; folders and globs in order of their file names.

    Args:
        names: Files, folders, globs, hub names; `NAME:2` gives all that the name stands for that weight.
        flag: The flag they came from, for errors.
        weights: Whether a weight has a meaning here.
        streaming: Whether hub sets are read without storing them.

    Raises:
        DataError: Something is missing, of no readable kind, or named twice; a weight is zero or has no meaning.
    """
    sources: list[Source] = []
    for given in names:
        try:
            name, weight = _weighted(given, flag, weights)
            found = _resolve_one(name, flag)
        except OSError as error:  # a folder that may not be looked into, a name that no file could have
            raise DataError("the data cannot be read", where=f"--{flag}", got=f"{given}: {error.strerror}") from None
        sources += [replace(s, weight=weight, streaming=streaming and s.path is None) for s in found]
    seen: set[str] = set()
    for source in sources:
        identity = str(source.path.resolve()) if source.path is not None else source.name
        if identity in seen:
            fix = f"name it once; to use its rows twice: {source.name}:2" if weights else "name it once"
            raise DataError("the data is named twice", where=f"--{flag}", got=source.name, fix=fix)
        seen.add(identity)
    return tuple(sources)


def _weighted(given: str, flag: str, weights: bool) -> tuple[str, float]:
    """A name and its weight; a file whose name itself ends like a weight is that file."""
    match = _WEIGHTED.fullmatch(given)
    if match is None or _path(given).exists():
        return given, 1.0
    weight = float(match["weight"])
    if not weights or weight == 0:
        raise DataError(
            "a weight must be more than zero" if weights else "only training data has weights",
            where=f"--{flag}",
            got=given,
            allowed="NAME:2 or NAME:0.5" if weights else match["name"],
            fix="leave the file out" if weights else f"write {match['name']}",
        )
    return match["name"], weight


def _path(name: str) -> Path:
    """The name with ~ filled in; ~ before an unknown user stays, where Path.expanduser raises RuntimeError."""
    return Path(os.path.expanduser(name))


def _suffix(path: Path) -> str:
    """The part of the name that tells the kind of file: .jsonl, or .jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _resolve_one(name: str, flag: str) -> list[Source]:
    path = _path(name)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if _suffix(p) in READERS and not p.name.startswith("."))
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
    if _suffix(path) not in READERS:
        excel = path.suffix.lower() in (".xlsx", ".xls")
        raise DataError(
            f"files of the kind {_suffix(path)!r} cannot be read" if path.suffix else "the file's name has no suffix",
            where=f"--{flag}",
            got=name,
            allowed=" ".join(SUFFIXES),
            fix="save the sheet as CSV UTF-8" if excel else "convert it to .jsonl, one object a line",
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
