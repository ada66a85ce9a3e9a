"""Makes the items of an iterator ahead of their use, on a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")
_AHEAD = 4  # items: as many are in memory beside the one in use


class _End:
    """Stands behind the last item."""


_END: Final = _End()


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items in order. While the caller uses one, the next ones are made.

    Raises what `items` raises, in the place of the item that could not be made."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="nvlm-ahead")
    try:
        coming: deque[Future[T | _End]] = deque(thread.submit(next, items, _END) for _ in range(_AHEAD))
        while not isinstance(item := coming.popleft().result(), _End):
            coming.append(thread.submit(next, items, _END))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)
