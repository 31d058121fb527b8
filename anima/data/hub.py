"""Data sets by their name on the hub: `owner/name`, `owner/name:config`, `owner/name[split]`, `owner/name[split:1000]`.

The only user of the `datasets` library; it keeps what it downloaded, so a second reading needs no network. Streaming
keeps nothing: the rows come over the network each time the tokens have to be made.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from anima.data.text_files import RawRow
from anima.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_NAME = re.compile(
    r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)(?::(?P<rows>[1-9]\d*))?\])?"
)


def is_hub_name(text: str, data_suffixes: tuple[str, ...]) -> bool:
    """Whether the text looks like a hub name; a name that ends like a data file is a file that is missing."""
    match = _NAME.fullmatch(text)
    return match is not None and not text.startswith(".") and not match["path"].lower().endswith(data_suffixes)


def _parts(name: str) -> tuple[str, str | None, str, int | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not a hub name: {name}")
    return match["path"], match["config"], match["split"] or "train", int(match["rows"]) if match["rows"] else None


@lru_cache(maxsize=8)
def _load(name: str, streaming: bool = False) -> "Dataset | IterableDataset":
    import datasets

    path, config, split, _ = _parts(name)
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    with _explained(name):
        return datasets.load_dataset(path, config, split=split, **options)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the library raises where the hub is asked, as a DataError that says what to do."""
    import datasets

    path, config, _, _ = _parts(name)
    call = f"datasets.load_dataset({path!r}, {config!r})" if config else f"datasets.load_dataset({path!r})"
    try:
        yield
    except ConnectionError as error:
        raise DataError(
            "the data set is no file here, and the hub cannot be reached",
            where=name,
            got=_first_line(error),
            fix=f'download it once on a login node: python -c "import datasets; {call}"; then set HF_HUB_OFFLINE=1',
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # OSError: a refusal of the hub, or a full disk; RuntimeError: a set that is made by a script.
        raise DataError(
            "the data set is no file here, and the hub does not give it",
            where=name,
            got=_first_line(error),
            allowed="a local file or folder, or owner/name, owner/name:config, owner/name[split]",
            fix="check the spelling, the configuration and the split (train unless given), and the room on the disk",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_hub(name: str, *, streaming: bool = False) -> Iterator[RawRow]:
    """Rows of one split, or the first of them if the name says how many, counted from 1.

    Args:
        name: The set's name.
        streaming: Read over the network without storing the set.

    Raises:
        DataError: The hub cannot be reached, or has no such data set, configuration or split.
    """
    rows = islice(_load(name, streaming), _parts(name)[3])
    number = 0
    try:
        for number, values in enumerate(rows, start=1):
            yield RawRow(dict(values), f": row {number}")
    except OSError as error:
        raise DataError(
            "the hub cannot be reached any more",
            where=f"{name}: after row {number}",
            got=_first_line(error),
            fix="start again; or leave out --hub_streaming, which stores the set before it is read",
        ) from None


def hub_fingerprint(name: str, *, streaming: bool = False) -> str:
    """What identifies the rows: name, revision and builder, as the `datasets` library hashes them, and how many."""
    rows = _parts(name)[3]
    text = _streamed_revision(name) if streaming else str(_load(name, False)._fingerprint)
    return text if rows is None else f"{text}:{rows}"


def _streamed_revision(name: str) -> str:
    """The revision of a set that is not stored: the builder's hash is the commit on the hub."""
    import datasets

    _load(name, True)  # tells the hub's errors
    path, config, split, _ = _parts(name)
    with _explained(name):
        builder = datasets.load_dataset_builder(path, config)
    return f"streamed:{path}:{builder.config.name}:{split}:{builder.hash}"
