"""What a call hands over while it runs, as an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def as_they_come(work: Callable[[Callable[[Item], None]], None]) -> Iterator[Item]:
    """Run `work(put)` in a thread of its own and yield each item that it puts, at once. Raises what `work` raises.

    If the iterator is closed early, the thread goes on: `work` has to be told to stop by other means.
    """
    handed: SimpleQueue[Callable[[], Item] | None] = SimpleQueue()

    def put(item: Item) -> None:
        handed.put(lambda: item)

    def run() -> None:
        try:
            work(put)
        except BaseException as error:
            handed.put(lambda error=error: _raise(error))  # type: ignore[misc]
        finally:
            handed.put(None)

    threading.Thread(target=run, daemon=True).start()
    while (get := handed.get()) is not None:
        yield get()


def _raise(error: BaseException) -> None:
    raise error
