"""Rows that say almost the same, by MinHash over stretches of characters. The only user of datasketch.

The similarity of two texts is the Jaccard index of their sets of five-character stretches, estimated from 128 hashes
(standard error 0.09 at most; Broder 1997).
"""

import re
import zlib

from datasketch import MinHash, MinHashLSH

STRETCH = 5
"""Characters of a stretch; works for scripts with and without spaces."""

NUM_HASHES = 128
FINEST = 0.95
"""Highest threshold of the index, which refuses 0.99 and more; candidates are compared with the similarity anyway."""

_SPACE = re.compile(r"\s+")


def normalised(text: str) -> str:
    """The text as it is compared: without differences of case and white space."""
    return _SPACE.sub(" ", text).strip().lower()


class NearDuplicates:
    """Remembers texts under a key and finds the ones that are similar to a new one.

    Args:
        similarity: Jaccard index from which two texts count as near duplicates, 0 to 1.
    """

    def __init__(self, similarity: float) -> None:
        self._similarity = similarity
        self._index = MinHashLSH(threshold=min(similarity, FINEST), num_perm=NUM_HASHES)
        self._hashes: dict[int, MinHash] = {}

    def find_and_add(self, key: int, text: str) -> list[tuple[int, float]]:
        """Keys of earlier texts that are similar, with the similarity, the most similar first; then remember this one.

        Args:
            key: Number of the text, used once.
            text: As `normalised` gives it.
        """
        pieces = {text[i : i + STRETCH].encode("utf-8", "replace") for i in range(max(1, len(text) - STRETCH + 1))}
        found = MinHash(num_perm=NUM_HASHES, hashfunc=zlib.crc32)
        found.update_batch(pieces)
        candidates = [(other, found.jaccard(self._hashes[other])) for other in self._index.query(found)]
        self._index.insert(key, found)
        self._hashes[key] = found
        similar = [(other, share) for other, share in candidates if share >= self._similarity]
        return sorted(similar, key=lambda pair: (-pair[1], pair[0]))
