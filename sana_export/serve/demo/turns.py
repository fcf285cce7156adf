"""Who may draw: one visitor at a time, in the order in which they came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sana_export.errors import Cancelled, UsageError
from sana_export.runtime.callbacks import IsCancelled

#: Seconds between two looks whether one who waits has left.
_LOOK_SECONDS = 0.1


class Turns:
    """A line of visitors. The first one draws."""

    def __init__(self, waiting: int) -> None:
        """waiting: how many may wait behind the one who draws."""
        self._most = waiting + 1
        self._line: list[object] = []
        self._changed = threading.Condition()

    @contextmanager
    def take(self, cancelled: IsCancelled, on_wait: Callable[[int], None]) -> Iterator[None]:
        """Wait for a turn, which lasts until the block ends.

        on_wait: called with the number of visitors before this one, whenever it changes.

        Raises UsageError if too many wait, and Cancelled when `cancelled` returns True before the turn has come.
        """
        mine = object()
        with self._changed:
            if len(self._line) >= self._most:
                raise UsageError(f"{self._most - 1} images wait already: please try again later")
            self._line.append(mine)
        try:
            self._wait(mine, cancelled, on_wait)
            yield
        finally:
            with self._changed:
                self._line.remove(mine)
                self._changed.notify_all()

    def _wait(self, mine: object, cancelled: IsCancelled, on_wait: Callable[[int], None]) -> None:
        told = 0
        with self._changed:
            while not cancelled():
                if not (before := self._line.index(mine)):
                    return
                if before != told:
                    on_wait(before)
                    told = before
                self._changed.wait(_LOOK_SECONDS)
        raise Cancelled("the visitor left before the turn came")
