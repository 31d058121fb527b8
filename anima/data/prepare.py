"""Files to tokenised sets, once: read, render, encode, count, cache, split. Needs no process group.

Every rank calls `prepare`; one builds, the others wait and map the result; errors in the data are raised by all.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Generic

import numpy as np
import pyarrow as pa

from anima.config.schema import DataConfig
from anima.data.cache import build_once
from anima.data.dataset import SequenceWriter, TokenizedDataset
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.kinds import CONVERSATIONS, Dataset, RecordKind
from anima.data.limits import EncodedRow, RowEncoder
from anima.data.order import shuffled
from anima.data.pair_formats import Unusable
from anima.data.records import Conversation
from anima.data.report import CacheEntry, PreparationReport, SetReport
from anima.data.sources import Source, resolve
from anima.data.templates import Template, make_template
from anima.data.tokenizer import Tokenizer, tokenizer_fingerprint
from anima.errors import DataError

logger = logging.getLogger(__name__)

CODE_VERSION = 1
"""Part of every cache key: raise it when the same data would give other tokens."""

SAME_ANSWERS = "chosen and rejected are the same"

SPLIT = 1
"""Purpose of the seeded order that holds rows out."""

BATCH_ROWS = 256
_LOG_ROWS = 100_000


@dataclass(frozen=True)
class PreparedData(Generic[Dataset]):
    """What a run trains on and is measured by."""

    train: Dataset
    eval: Dataset | None
    report: PreparationReport


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
        seed: Decides which rows are held out by --eval_size; it does not touch the cache.
        template: The template to render with; None: the one that the config names.

    Raises:
        DataError: A file or row cannot be used, nothing is left to train on, or the cache cannot be written.
        ModelError: The tokenizer lacks something that the options need.
    """
    if template is None:
        template = make_template(config.chat_template, tokenizer, mask_answers=config.train_on == "assistant")
    train_sources = resolve(config.train_files, "train_files")
    eval_sources = resolve(config.eval_files, "eval_files")
    identity = {**_identity(config, tokenizer, template), "records": kind.name}
    train_hashes = [source.content_hash() for source in train_sources]
    eval_hashes = [source.content_hash() for source in eval_sources]
    _check_apart(train_sources, train_hashes, eval_sources, eval_hashes)
    builder = _Builder(kind, config, tokenizer, template)
    whole, train_report, train_cache = builder.build(train_sources, _key(identity, train_hashes))
    eval_report = eval_cache = None
    held_out: Dataset | None
    if eval_sources:
        train = whole
        held_out, eval_report, eval_cache = builder.build(eval_sources, _key(identity, eval_hashes))
    else:
        train, held_out = split(whole, config.eval_size, seed)
    sets = {"train": train} if held_out is None else {"train": train, "eval": held_out}
    report = PreparationReport(
        template=template.name,
        train=train_report,
        train_cache=train_cache,
        train_rows=len(train),
        eval=eval_report,
        eval_cache=eval_cache,
        eval_rows=len(held_out) if held_out is not None else 0,
        unit=kind.name,
        notes=tuple(f"{name}: {note}" for name, part in sets.items() for note in kind.notes(part)),
    )
    return PreparedData(train, held_out, report)


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


class _Builder(Generic[Dataset]):
    """Tokenised sets from sources, through the cache."""

    def __init__(self, kind: RecordKind[Dataset], config: DataConfig, tokenizer: Tokenizer, template: Template) -> None:
        self._kind = kind
        self._config = config
        self._template = template
        self._encoder = RowEncoder(tokenizer, config, last_answer_only=kind.last_answer_only)
        self._cache_dir = Path(config.data_cache_dir).expanduser()

    def build(self, sources: Sequence[Source], key: str) -> tuple[Dataset, SetReport, CacheEntry]:
        folder = self._cache_dir / key[:32]
        names = [source.name for source in sources]
        built = build_once(folder, partial(self._fill, sources=sources))
        try:
            report = SetReport.from_json(json.loads((folder / "report.json").read_text("utf-8")), names)
            dataset = self._kind.dataset(TokenizedDataset.open(folder / "tokens.arrow", names, key))
        except (OSError, ValueError, KeyError, pa.ArrowInvalid) as error:
            raise DataError(
                "the cached data is damaged", where=folder, got=str(error).splitlines()[0], fix=f"rm -r {folder}"
            ) from None
        return dataset, report, CacheEntry(key, str(folder), reused=not built)

    def _fill(self, folder: Path, sources: Sequence[Source]) -> None:
        """Write the tokens and the report of all sources into an empty folder."""
        report = SetReport()
        writer = SequenceWriter(folder / "tokens.arrow")
        try:
            for number, source in enumerate(sources):
                rows = self._rows(source, number, report)
                while batch := list(islice(rows, BATCH_ROWS)):
                    writer.write(self._encode(batch, number, report))
        finally:
            writer.close()
        self._check(report, sources)
        (folder / "report.json").write_text(json.dumps(report.to_json(), ensure_ascii=False), "utf-8")

    def _rows(self, source: Source, file: int, report: SetReport) -> Iterator[tuple[tuple[Conversation, ...], str]]:
        """The rows of a source as conversations to render, with their places, counted."""
        before = report.rows
        chosen = self._config.dataset_format
        layout = "" if chosen == "auto" else str(chosen)
        for row in source.rows():
            where = source.name + row.place
            layout = layout or self._kind.detect(row.values, where)
            found = self._kind.read(row.values, layout, where)
            report.rows += 1
            report.formats[layout] = report.formats.get(layout, 0) + 1
            if report.rows % _LOG_ROWS == 0:
                logger.info("%s rows read", f"{report.rows:,}")
            if isinstance(found, Unusable):
                report.drop(found.reason, file, row.place)
            else:
                yield found, row.place
        if report.rows == before:
            raise DataError("the file holds no rows", where=source.name, fix="leave it out, or write it again")

    def _encode(
        self, batch: Sequence[tuple[tuple[Conversation, ...], str]], file: int, report: SetReport
    ) -> list[tuple[TokenSequence, int, str]]:
        """The sequences of a batch that are kept; all are counted."""
        rows = [[self._template.segments(conversation) for conversation in found] for found, _ in batch]
        encoded = self._encoder.encode(rows, [found[0].source for found, _ in batch])
        kept = []
        for row, (_, place) in zip(encoded, batch, strict=True):
            if not row.sequences:
                report.drop(str(row.dropped), file, place)
            elif len(row.sequences) > 1 and len({side.input_ids.tobytes() for side in row.sequences}) == 1:
                report.drop(SAME_ANSWERS, file, place)
            else:
                _count(report, row)
                if row.trimmed:
                    report.trimmed.add(file, place)
                kept += [(sequence, file, place) for sequence in row.sequences]
        return kept

    def _check(self, report: SetReport, sources: Sequence[Source]) -> None:
        """Refuse a set from which nothing right can be learned."""
        names = [source.name for source in sources]
        reasons = "; ".join(f"{reason}: {tally.named(names)}" for reason, tally in report.dropped.items())
        if report.kept == 0 or report.supervised_tokens == 0:
            raise DataError(
                "no row is left to use" if report.kept == 0 else "nothing in the data carries loss",
                where=", ".join(names),
                got=f"{report.rows} rows; dropped: {reasons or 'none'}",
                fix="raise --max_seq_length, --source_max_len, --target_max_len, or use --truncation trim_prompt",
            )
        if report.stopped_answers < report.answers:
            raise DataError(
                "answers without a supervised stop token: the model would not learn to end",
                where=", ".join(names),
                got=f"{report.answers - report.stopped_answers} of {report.answers} answers",
                fix="use another --chat_template",
            )


def _count(report: SetReport, row: EncodedRow) -> None:
    report.kept += 1
    for sequence in row.sequences:
        report.tokens += len(sequence)
        # The first token of a sequence is predicted from nothing, so its label never counts.
        report.supervised_tokens += int(np.count_nonzero(sequence.labels[1:] != IGNORE_INDEX))
        report.longest = max(report.longest, len(sequence))
    report.answers += row.num_answers
    report.stopped_answers += row.num_stopped
