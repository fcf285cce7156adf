"""What a call hands over while it runs, as an iterator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def as_they_come(work: Callable[[Callable[[Item], None]], None]) -> Iterator[Item]:
    """Run `work(put)` in a thread of its own and yield each item that it puts, at once. Raises what `work` raises.

    If the iterator is closed early, the thread goes on: `work` has to be told to stop by other means.
    """
    handed = SimpleQueue[Item | _Ended]()

    def run() -> None:
        error: BaseException | None = None
        try:
            work(handed.put)
        except BaseException as raised:
            error = raised
        handed.put(_Ended(error))

    threading.Thread(target=run, daemon=True).start()
    while not isinstance(item := handed.get(), _Ended):
        yield item
    if item.error is not None:
        raise item.error


@dataclass(frozen=True)
class _Ended:
    """The last thing that is handed over: the work is done, or failed."""

    error: BaseException | None
