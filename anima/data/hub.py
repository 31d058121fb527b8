"""Data sets by their name on the hub: `owner/name`, `owner/name:config`, `owner/name[split]`.

The only user of the `datasets` library; it keeps what it downloaded, so a second reading needs no network.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from anima.data.text_files import RawRow
from anima.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = re.compile(r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:\[(?P<split>[\w.-]+)\])?")


def is_hub_name(text: str, data_suffixes: tuple[str, ...]) -> bool:
    """Whether the text looks like a hub name; a name that ends like a data file is a file that is missing."""
    match = _NAME.fullmatch(text)
    return match is not None and not text.startswith(".") and not match["path"].lower().endswith(data_suffixes)


def _parts(name: str) -> tuple[str, str | None, str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"not a hub name: {name}")
    return match["path"], match["config"], match["split"] or "train"


@lru_cache(maxsize=8)
def _load(name: str) -> "Dataset":
    import datasets

    path, config, split = _parts(name)
    call = f"datasets.load_dataset({path!r}, {config!r})" if config else f"datasets.load_dataset({path!r})"
    try:
        return datasets.load_dataset(path, config, split=split)
    except ConnectionError as error:
        raise DataError(
            "the data set is no file here, and the hub cannot be reached",
            where=name,
            got=str(error).splitlines()[0],
            fix=f'download it once on a login node: python -c "import datasets; {call}"; then set HF_HUB_OFFLINE=1',
        ) from None
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(
            "the data set is no file here, and the hub does not give it",
            where=name,
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            allowed="a local file or folder, or owner/name, owner/name:config, owner/name[split]",
            fix="check the spelling, the configuration and the split (train unless given)",
        ) from None


def read_hub(name: str) -> Iterator[RawRow]:
    """Rows of one split, counted from 1.

    Raises:
        DataError: The hub cannot be reached, or has no such data set, configuration or split.
    """
    for number, values in enumerate(_load(name), start=1):
        yield RawRow(dict(values), f": row {number}")


def hub_fingerprint(name: str) -> str:
    """What identifies the split's content: name, revision and builder, as the `datasets` library hashes them."""
    return str(_load(name)._fingerprint)
