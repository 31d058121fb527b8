"""Tokenised sequences on disk: an Arrow file that is mapped into memory, so that its size does not matter.

Labels are kept as the lengths of alternating given and learned stretches. Knows no text.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from anima.data.batching import MicroBatch, collate, filler
from anima.data.encode import IGNORE_INDEX, TokenSequence
from anima.data.order import IndexArray

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("stretches", pa.list_(pa.int32())),
        ("file", pa.int32()),
        ("place", pa.string()),
    ]
)


def stretches(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Lengths of the alternating stretches of labels, given first: -100 -100 5 6 -100 is 2 2 1; 5 6 is 0 2."""
    learned = labels != IGNORE_INDEX
    borders = np.flatnonzero(np.diff(learned)) + 1
    lead = [0, 0] if learned.size and learned[0] else [0]
    return np.diff(np.concatenate([lead, borders, [labels.size]])).astype(np.int32)


class SequenceWriter:
    """Writes sequences batch by batch; `close` before the file is used."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)

    def write(self, rows: Sequence[tuple[TokenSequence, int, str]]) -> None:
        """Append rows: the sequence, the number of its file, its place in it."""
        columns = [
            pa.array([sequence.input_ids for sequence, _, _ in rows], SCHEMA.field("input_ids").type),
            pa.array([stretches(sequence.labels) for sequence, _, _ in rows], SCHEMA.field("stretches").type),
            pa.array([file for _, file, _ in rows], pa.int32()),
            pa.array([place for _, _, place in rows], pa.string()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=SCHEMA))

    def close(self) -> None:
        """Finish the file and release it."""
        self._writer.close()
        self._file.close()


class _Ragged:
    """A list column over all batches of a file, as numpy views of the mapped memory."""

    def __init__(self, chunks: Sequence[pa.ListArray]) -> None:
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def lengths(self) -> IndexArray:
        parts = [np.diff(offsets).astype(np.int64) for offsets in self._offsets]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def firsts(self) -> IndexArray:
        parts = [
            values[offsets[:-1]].astype(np.int64) for values, offsets in zip(self._values, self._offsets, strict=True)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def __getitem__(self, row: int) -> npt.NDArray[np.int32]:
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        offsets, within = self._offsets[chunk], row - int(self._starts[chunk])
        part: npt.NDArray[np.int32] = self._values[chunk][offsets[within] : offsets[within + 1]]
        return part


class TokenizedDataset:
    """Sequences by number, without reading the others.

    Attributes:
        lengths: Tokens of each sequence, int64 of shape (len,).
        fingerprint: Changes when a sequence or the order does.
    """

    def __init__(self, table: pa.Table, names: Sequence[str], fingerprint: str, rows: IndexArray | None = None) -> None:
        self._table = table
        self._names = tuple(names)
        self._input_ids = _Ragged(table["input_ids"].chunks)
        self._stretches = _Ragged(table["stretches"].chunks)
        self._rows = np.arange(table.num_rows, dtype=np.int64) if rows is None else rows
        self.lengths: IndexArray = self._input_ids.lengths()[self._rows]
        self.fingerprint = fingerprint

    @classmethod
    def open(cls, path: Path, names: Sequence[str], fingerprint: str) -> "TokenizedDataset":
        """Map a file that a SequenceWriter has finished; `names` are those of the data files, by number."""
        with pa.memory_map(str(path)) as file:
            return cls(pa.ipc.open_file(file).read_all(), names, fingerprint)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenSequence:
        row = int(self._rows[index])
        input_ids = self._input_ids[row]
        lengths = self._stretches[row]
        learned = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
        return TokenSequence(input_ids, np.where(learned, input_ids, np.int32(IGNORE_INDEX)).astype(np.int32))

    def batch(self, indices: Sequence[int] | IndexArray) -> MicroBatch:
        """The sequences of these numbers in one packed row."""
        return collate([self[int(i)] for i in indices])

    def filler(self) -> MicroBatch:
        """A row without loss, for a rank that has nothing to do."""
        return filler(self[0])

    def source(self, index: int) -> str:
        """Where the sequence comes from, as `file:line`."""
        row = int(self._rows[index])
        file, place = self._table["file"][row].as_py(), self._table["place"][row].as_py()
        return f"{self._names[file]}{place}"

    @property
    def given(self) -> IndexArray:
        """Tokens before the first learned one of each sequence, int64 of shape (len,)."""
        return self._stretches.firsts()[self._rows]

    @property
    def files(self) -> npt.NDArray[np.int32]:
        """The number of the data file of each sequence, int32 of shape (len,)."""
        numbers: npt.NDArray[np.int32] = self._table["file"].to_numpy()
        return numbers[self._rows]

    def select(self, indices: Sequence[int] | IndexArray) -> "TokenizedDataset":
        """The sequences of these numbers, in this order; nothing is copied."""
        rows = self._rows[np.asarray(indices, dtype=np.int64)]
        digest = hashlib.sha256(self.fingerprint.encode() + rows.astype("<i8").tobytes()).hexdigest()
        return TokenizedDataset(self._table, self._names, digest, rows)
