"""The reference's log-probabilities on disk: computed once, used by every later epoch, restart and trial.

    <root>/<key>/identity.json      everything the numbers depend on; the key is its hash
    <root>/<key>/part-<hash>.npz    numbers of pairs, int64 (n,), and their log-probabilities, fp32 (n, 2)

A part is there whole or not at all (each entry carries a checksum), so work that was cut off goes on where it stopped.
Knows neither models nor ranks.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from anima.config.paths import expanded
from anima.data.order import IndexArray
from anima.data.pairs import LogpsArray
from anima.disk import replace_file

IDENTITY = "identity.json"


class ReferenceCache:
    """The log-probabilities of one set of pairs under one reference.

    Args:
        root: Folder of all such caches.
        identity: Everything the numbers depend on, as texts.
        pairs: Size of the set.
    """

    def __init__(self, root: Path, identity: Mapping[str, str], pairs: int) -> None:
        self._identity = {**identity, "pairs": str(pairs)}
        self._pairs = pairs
        text = json.dumps(self._identity, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.folder = expanded(root, "--reference_cache_dir") / self.key

    def load(self) -> tuple[LogpsArray, list[str]]:
        """What is known: fp32 (pairs, 2) with NaN for the unknown, and what was found and not used."""
        known: LogpsArray = np.full((self._pairs, 2), np.nan, dtype=np.float32)
        parts = sorted(self.folder.glob("part-*.npz"))
        if not parts:
            return known, []
        if not self._is_ours():
            return known, [f"{self.folder} belongs to something else or is damaged: not used"]
        problems = []
        for path in parts:
            try:
                numbers, logps = self._read(path)
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                problems.append(f"{path} is damaged ({error}): not used")
                continue
            known[numbers] = logps
        return known, problems

    def add(self, numbers: IndexArray, logps: LogpsArray) -> None:
        """Keep the log-probabilities of some pairs.

        Raises:
            OSError: the disk refuses; what was kept before is untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_ours():
            for path in self.folder.glob("part-*.npz"):
                path.unlink()
            replace_file(self.folder / IDENTITY, json.dumps(self._identity, indent=1, sort_keys=True).encode())
        digest = hashlib.sha256(numbers.astype("<i8").tobytes() + logps.astype("<f4").tobytes()).hexdigest()
        part = io.BytesIO()
        np.savez(part, numbers=numbers.astype(np.int64), logps=logps.astype(np.float32))
        replace_file(self.folder / f"part-{digest[:16]}.npz", part.getvalue())

    def _is_ours(self) -> bool:
        try:
            return bool(json.loads((self.folder / IDENTITY).read_text("utf-8")) == self._identity)
        except (OSError, ValueError):
            return False

    def _read(self, path: Path) -> tuple[IndexArray, LogpsArray]:
        with np.load(path) as part:  # without pickles; zip checks the sums of the entries
            numbers, logps = part["numbers"], part["logps"]
        if numbers.dtype != np.int64 or logps.shape != (len(numbers), 2):
            raise ValueError(f"shapes {numbers.shape} and {logps.shape}")
        if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < self._pairs):
            raise ValueError("pairs that the set does not have")
        if not np.isfinite(logps).all():
            raise ValueError("numbers that are not finite")
        return numbers, logps
