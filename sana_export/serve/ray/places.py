"""The jobs of a front replica that wait for a drawing replica: bounded, and API keys take turns.

Ray's own queue serves whoever came first, so it gets a few jobs at a time (`at_door`); the others wait here. All methods are for
one event loop.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Collection
from types import TracebackType

from sana_export.serve.errors import Refusal


class Places:
    """Places for jobs that wait."""

    def __init__(self, places: int, keys: Collection[str], at_door: int) -> None:
        """keys: all keys that may come. Each of them can have one job here, however many the others have.

        at_door: jobs that Ray gets before a replica has accepted one of them.
        """
        self._places, self._keys, self._free = places, frozenset(keys), at_door
        self._by_key: Counter[str] = Counter()
        #: Those that Ray has not got yet, by key; the key whose turn it is comes first.
        self._lanes: OrderedDict[str, OrderedDict[asyncio.Future[None], None]] = OrderedDict()

    def __len__(self) -> int:
        return self._by_key.total()

    def take(self, key: str, retry_after: float | None = None) -> WaitingJob:
        """A place for a job of a key. Raises Refusal "queue_full", which asks to come back after so many seconds."""
        kept = len(self._keys - self._by_key.keys() - {key}) if key in self._by_key else 0
        if len(self) + kept >= self._places:
            raise Refusal(
                "queue_full", f"all {self._places} places in the queue are taken; try again later", retry_after=retry_after
            )
        self._by_key[key] += 1
        return WaitingJob(self, key)

    async def come_to_door(self, key: str) -> None:
        """Wait until Ray may get a job of this key."""
        if self._free:
            self._free -= 1
            return
        lane, turn = self._lanes.setdefault(key, OrderedDict()), asyncio.get_running_loop().create_future()
        lane[turn] = None
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # its turn came when it was about to leave
                self.leave_door()
            raise
        finally:
            lane.pop(turn, None)
            if not lane and self._lanes.get(key) is lane:
                del self._lanes[key]

    def leave_door(self) -> None:
        """A job at the door was accepted, or gave up: the next one comes there."""
        for key, lane in self._lanes.items():
            for turn in lane:
                if not turn.done():
                    turn.set_result(None)
                    self._lanes.move_to_end(key)
                    return
        self._free += 1

    def give_back(self, key: str) -> None:
        """A job of this key waits no more."""
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]


class WaitingJob:
    """The place of one job, for a `with` block: at its end, the job waits no more."""

    def __init__(self, places: Places, key: str) -> None:
        self._places, self._key = places, key
        self._at_door = False
        #: Whether the job still waits for a replica.
        self.waits = True

    async def come_to_door(self) -> None:
        """Wait until Ray may get the job."""
        await self._places.come_to_door(self._key)
        self._at_door = True

    def leave(self) -> None:
        """The job is accepted by a replica, or gives up."""
        if self.waits:
            self._places.give_back(self._key)
        if self._at_door:
            self._places.leave_door()
        self.waits = self._at_door = False

    def __enter__(self) -> WaitingJob:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.leave()
