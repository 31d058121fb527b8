"""Files to tokenised sets, once: read, render, encode, count, cache, split. Needs no process group.

Every rank calls `prepare`; one builds, the others wait and map the result; errors in the data are raised by all.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anima.config.paths import expanded
from anima.config.schema import DataConfig
from anima.data.cache import build_once
from anima.data.dataset import SequenceWriter, TokenizedDataset
from anima.data.kinds import CONVERSATIONS, Dataset, RecordKind
from anima.data.mixture import mix
from anima.data.order import shuffled
from anima.data.report import CacheEntry, PreparationReport, SetReport
from anima.data.row_batches import row_batches
from anima.data.row_work import BAD_ROW, RowWork
from anima.data.sources import Source, resolve
from anima.data.templates import Template, make_template
from anima.data.tokenizer import Tokenizer, tokenizer_fingerprint
from anima.data.workers import encode_all
from anima.errors import DataError

CODE_VERSION = 2
"""Part of every cache key: raise it when the same data would give other tokens."""

LENGTHS = "lengths.npy"

SPLIT = 1
"""Purpose of the seeded order that holds rows out."""


@dataclass(frozen=True)
class PreparedData(Generic[Dataset]):
    """What a run trains on and is measured by."""

    train: Dataset
    eval: Dataset | None
    report: PreparationReport


@dataclass(frozen=True)
class TokenizedSet(Generic[Dataset]):
    """One set of files as it lies in the cache, whatever can be learned from it."""

    sources: tuple[Source, ...]
    dataset: Dataset
    report: SetReport
    cache: CacheEntry

    def lengths(self) -> npt.NDArray[np.int32]:
        """Source, target and total tokens of every row that could be rendered, before cutting: (rows, 3).

        Raises:
            DataError: The cached file is damaged.
        """
        with _undamaged(Path(self.cache.path)):
            found: npt.NDArray[np.int32] = np.load(Path(self.cache.path) / LENGTHS, allow_pickle=False)
        return found


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, template: Template | None = None
) -> PreparedData[TokenizedDataset]:
    """`prepare_records` of conversations."""
    return prepare_records(CONVERSATIONS, config, tokenizer, seed=seed, template=template)


def prepare_records(
    kind: RecordKind[Dataset],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    template: Template | None = None,
) -> PreparedData[Dataset]:
    """Tokenise the training and held-out data, or map what an earlier call left in the cache.

    Args:
        kind: What a row is.
        config: What is read, how it is rendered, the limits, the cache folder.
        tokenizer: The model's tokenizer.
        seed: Decides which rows are held out by --eval_size and which a fractional weight chooses; it does not touch
            the cache.
        template: The template to render with; None: the one that the config names.

    Raises:
        DataError: A file or row cannot be used, nothing is left to train on, or the cache cannot be written.
        ModelError: The tokenizer lacks something that the options need.
    """
    if template is None:
        template = make_template(config.chat_template, tokenizer, mask_answers=config.train_on == "assistant")
    whole, held_out_set = tokenise(kind, config, tokenizer, template)
    check_usable(whole)
    held_out: Dataset | None
    if held_out_set is not None:
        check_usable(held_out_set)
        train, held_out = whole.dataset, held_out_set.dataset
    else:
        train, held_out = split(whole.dataset, config.eval_size, seed)
    train, mixture = mix(train, whole.sources, seed)  # after the split, so that no copy of a row is held out
    sets = {"train": train} if held_out is None else {"train": train, "eval": held_out}
    report = PreparationReport(
        template=template.name,
        train=whole.report,
        train_cache=whole.cache,
        train_rows=len(train),
        eval=None if held_out_set is None else held_out_set.report,
        eval_cache=None if held_out_set is None else held_out_set.cache,
        eval_rows=len(held_out) if held_out is not None else 0,
        unit=kind.name,
        notes=tuple(f"{name}: {note}" for name, part in sets.items() for note in kind.notes(part)),
        mixture=mixture,
    )
    return PreparedData(train, held_out, report)


def tokenise(
    kind: RecordKind[Dataset], config: DataConfig, tokenizer: Tokenizer, template: Template
) -> tuple[TokenizedSet[Dataset], TokenizedSet[Dataset] | None]:
    """The training files and the held-out files in tokens, whether or not anything can be learned from them.

    Raises:
        DataError: As for `prepare_records`, but for sets from which nothing is left.
        ModelError: The tokenizer lacks something that the options need.
    """
    train_sources = resolve(config.train_files, "train_files", streaming=config.hub_streaming)
    eval_sources = resolve(config.eval_files, "eval_files", weights=False, streaming=config.hub_streaming)
    cache_dir = expanded(config.data_cache_dir, "--data_cache_dir")
    identity = {**_identity(config, tokenizer, template), "records": kind.name}
    train_hashes = [source.content_hash(cache_dir) for source in train_sources]
    eval_hashes = [source.content_hash(cache_dir) for source in eval_sources]
    _check_apart(train_sources, train_hashes, eval_sources, eval_hashes)
    builder = _Builder(kind, config, tokenizer, template)
    whole = builder.build(train_sources, _key(identity, train_hashes))
    if not eval_sources:
        return whole, None
    return whole, builder.build(eval_sources, _key(identity, eval_hashes))


def split(dataset: Dataset, size: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Training and held-out part, each in the order of the files; together they are the whole.

    Args:
        dataset: All examples.
        size: Rows if 1 or more, share of the rows if below 1, 0 for none.
        seed: Decides which rows are held out.

    Raises:
        DataError: One of the two parts would be empty.
    """
    if size == 0:
        return dataset, None
    rows = len(dataset)
    count = int(size) if size >= 1 else round(size * rows)
    if count == 0 or count >= rows:
        raise DataError(
            "nothing would be held out" if count == 0 else "nothing would be left to train on",
            where="--eval_size",
            got=f"{size:g} of {rows} rows",
            allowed=f"1 to {rows - 1} rows, or a share" if rows > 1 else "0: one row cannot be split",
        )
    order = shuffled(rows, seed, SPLIT)
    return dataset.select(np.sort(order[count:])), dataset.select(np.sort(order[:count]))


def _identity(config: DataConfig, tokenizer: Tokenizer, template: Template) -> dict[str, object]:
    """Everything but the files that decides the tokens."""
    return {
        "code": CODE_VERSION,
        "template": template.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "dataset_format": config.dataset_format,
        "limits": [config.sequence_limit, config.source_max_len, config.target_max_len],
        "truncation": config.truncation,
        "train_on": config.train_on,
        "bad_rows": config.bad_rows,
    }


def _key(identity: dict[str, object], hashes: Sequence[str]) -> str:
    text = json.dumps({**identity, "files": list(hashes)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_apart(
    train: Sequence[Source], train_hashes: Sequence[str], held_out: Sequence[Source], held_out_hashes: Sequence[str]
) -> None:
    for source, content in zip(held_out, held_out_hashes, strict=True):
        if content in train_hashes:
            raise DataError(
                "a held-out file is also trained on",
                where="--eval_files",
                got=f"{source.name}, the same as {train[train_hashes.index(content)].name}",
                fix="take it out of one of the two, or use --eval_size",
            )


def check_usable(found: TokenizedSet[Dataset]) -> None:
    """Refuse a set from which nothing right can be learned.

    Raises:
        DataError: No row is left, nothing carries loss, or answers do not end in a supervised stop token.
    """
    report, names = found.report, ", ".join(found.report.files)
    if report.kept == 0 or report.supervised_tokens == 0:
        reasons = "; ".join(f"{reason}: {tally}" for reason, tally in report.dropped.items())
        bad = sum(tally.rows for reason, tally in report.dropped.items() if reason.startswith(BAD_ROW))
        longer = "raise --max_seq_length, --source_max_len, --target_max_len, or use --truncation trim_prompt"
        raise DataError(
            "no row is left to use" if report.kept == 0 else "nothing in the data carries loss",
            where=names,
            got=f"{report.rows} rows; dropped: {reasons or 'none'}",
            fix="mend the rows, or name their layout with --dataset_format" if 2 * bad > report.rows else longer,
        )
    if report.stopped_answers < report.answers:
        raise DataError(
            "answers without a supervised stop token: the model would not learn to end",
            where=names,
            got=f"{report.answers - report.stopped_answers} of {report.answers} answers",
            fix="use another --chat_template",
        )


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    """What a reader of a cached folder meets in a file that is missing, cut off or garbled, as an error that helps."""
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        got = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError("the cached data is damaged", where=folder, got=got, fix=f"rm -r {folder}") from error


class _Builder(Generic[Dataset]):
    """Tokenised sets from sources, through the cache."""

    def __init__(self, kind: RecordKind[Dataset], config: DataConfig, tokenizer: Tokenizer, template: Template) -> None:
        self._kind = kind
        self._config = config
        self._work = RowWork(kind, config, tokenizer, template)
        self._cache_dir = expanded(config.data_cache_dir, "--data_cache_dir")

    def build(self, sources: tuple[Source, ...], key: str) -> TokenizedSet[Dataset]:
        folder = self._cache_dir / key[:32]
        names = [source.name for source in sources]
        built = build_once(folder, partial(self._fill, sources=sources))
        with _undamaged(folder):
            report = SetReport.from_json(json.loads((folder / "report.json").read_text("utf-8")), names)
            dataset = self._kind.dataset(TokenizedDataset.open(folder / "tokens.arrow", names, key))
        return TokenizedSet(sources, dataset, report, CacheEntry(key, str(folder), reused=not built))

    def _fill(self, folder: Path, sources: Sequence[Source]) -> None:
        """Write the tokens, the lengths and the report of all sources into an empty folder."""
        report = SetReport()
        lengths = [np.zeros((0, 3), np.int32)]
        writer = SequenceWriter(folder / "tokens.arrow")
        try:
            batches = row_batches(self._config, self._kind.detect, sources, report)
            for encoded in encode_all(self._work, batches, self._config.data_workers):
                writer.write(encoded.kept)
                lengths.append(encoded.lengths)
                report.merge(encoded.report)
        finally:
            writer.close()
        np.save(folder / LENGTHS, np.concatenate(lengths), allow_pickle=False)
        (folder / "report.json").write_text(json.dumps(report.to_json(), ensure_ascii=False), "utf-8")
