"""A bar over bytes for conversions, and the most host memory that this process ever had. The only user of tqdm.

In a log there is a plain line every half minute instead of a bar.
"""

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_LOG_SECONDS = 30.0


@contextmanager
def byte_bar(word: str) -> Iterator[Callable[[int, int], None]]:
    """What is yielded is told the bytes done and all of them; the bar closes with the block.

    Args:
        word: What is being done.
    """
    on_terminal = sys.stderr.isatty()
    with tqdm(
        desc=word,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.1 if on_terminal else _LOG_SECONDS,
        leave=on_terminal,
        delay=0 if on_terminal else _LOG_SECONDS,  # nothing at all for short work
        disable=None if on_terminal else False,
        ascii=not on_terminal,
    ) as bar:

        def reach(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield reach


def host_peak_gib() -> float:
    """Highest resident memory of this process so far, GiB; pages of mapped files that were in use count too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
