"""Work done in threads before it is needed, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def prefetch(items: Iterable[T], work: Callable[[T], R], *, workers: int, depth: int) -> Iterator[tuple[T, R]]:
    """Each item with its result, in order; what `work` raises is raised at its item's turn.

    Args:
        items: read in the caller's thread, at most `depth` beyond the item that is given out.
        work: done in `workers` threads (Pillow decodes outside of Python's lock).
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
