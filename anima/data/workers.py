"""Row work in several processes, results in the order of the batches. Small sets stay in this process.

Processes are spawned, not forked: tokenizers run threads, and a fork would copy their locks. Knows no files.
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.connection import wait
from multiprocessing.reduction import ForkingPickler
from pickle import PicklingError

from anima.data.row_work import EncodedBatch, RowBatch, RowWork
from anima.errors import DataError

logger = logging.getLogger(__name__)

FIRST_BATCHES = 64
"""Batches (16,384 rows) done in this process before others are started: to start them takes some 5 seconds."""

MAX_WORKERS = 16
_AHEAD = 4
"""Batches a worker that may wait for their turn: bounds the memory."""


def encode_all(work: RowWork, batches: Iterator[RowBatch], workers: int | None) -> Iterator[EncodedBatch]:
    """The encoded batches, in order.

    Args:
        work: What is done to a batch.
        batches: The batches.
        workers: Number of processes; None: one a core that this process may use, at most 16.

    Raises:
        DataError: What the work raises, for the first batch that fails; or a process was killed.
    """
    count = workers if workers is not None else min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    if count > 1 and not _can_be_sent(work):
        logger.warning("the tokenizer cannot be sent to other processes: tokenising in one")
        count = 1
    yield from map(work.encode, islice(batches, FIRST_BATCHES if count > 1 else None))
    first = next(batches, None)
    if first is None:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start, initargs=(work,)) as pool:
        waiting: deque[Future[EncodedBatch]] = deque([pool.submit(_encode, first)])
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) >= _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process that tokenises was killed",
                where="--data_workers",
                got=f"{count} processes",
                fix="if memory ran out, use fewer: --data_workers 1",
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _can_be_sent(work: RowWork) -> bool:
    try:
        ForkingPickler.dumps(work)
    except (TypeError, AttributeError, PicklingError):
        return False
    return True


_work: RowWork | None = None
"""The work of a spawned process; it has no other use."""


def _start(work: RowWork) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent says no goodbye, and its children would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
    os._exit(1)


def _encode(batch: RowBatch) -> EncodedBatch:
    if _work is None:
        raise RuntimeError("a worker without work")
    return _work.encode(batch)
