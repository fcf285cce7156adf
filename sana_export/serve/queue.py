"""A bounded queue of images to draw. API keys take turns, images that can be drawn together leave it together.

No HTTP and no asyncio: threads share it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Generic, TypeVar

from sana_export.serve.errors import Refusal

Payload = TypeVar("Payload")


@dataclass(eq=False)
class Ticket(Generic[Payload]):
    """One image that waits."""

    #: The id of the API key.
    key: str
    #: Images with equal groups can be drawn together. None: only alone.
    group: Hashable
    payload: Payload
    #: Whether nobody waits for it any more.
    left: bool = False
    #: `monotonic()` of its arrival.
    since: float = 0.0


class FairQueue(Generic[Payload]):
    """Tickets, in one lane for each key; within a lane, the oldest first."""

    def __init__(self, places: int, keys: Collection[str] = (), clock: Callable[[], float] = monotonic) -> None:
        """`keys`: all keys that may come. Each of them can have one ticket in the queue, however many the others have."""
        self._places, self._keys, self._clock = places, frozenset(keys), clock
        self._lanes: OrderedDict[str, OrderedDict[Ticket[Payload], None]] = OrderedDict()
        self._count, self._closed = 0, False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def put(self, tickets: Sequence[Ticket[Payload]]) -> int:
        """Add tickets of one key, all or none. Returns how many were there before.

        Raises Refusal: "queue_full", or "shutting_down" after `close`.
        """
        with self._changed:
            if self._closed:
                raise Refusal("shutting_down", "the server is shutting down")
            key, before = tickets[0].key, self._count
            if before + len(tickets) + self._kept_from(key, len(tickets)) > self._places:
                raise Refusal("queue_full", f"all {self._places} places in the queue are taken; try again later")
            lane = self._lanes.setdefault(key, OrderedDict())
            for ticket in tickets:
                ticket.since = self._clock()
                lane[ticket] = None
            self._count += len(tickets)
            self._changed.notify_all()
            return before

    def take(self, most: int = 1, wait: float = 0.0) -> list[Ticket[Payload]]:
        """Wait for a ticket and take it, with up to `most` - 1 others of its group.

        Returns an empty list when the queue is closed and empty.


        wait: seconds that a batch of fewer than `most` waits for more.
        """
        with self._changed:
            while not self._count and not self._closed:
                self._changed.wait()
            if not self._count:
                return []
            first = next(iter(next(iter(self._lanes.values()))))
            self._remove(first, to_the_end=True)
            batch, until = [first], self._clock() + wait
            while first.group is not None:
                self._fill(batch, most)
                left = until - self._clock()
                if len(batch) >= most or left <= 0 or self._closed:
                    break
                self._changed.wait(left)
            return batch

    def remove(self, ticket: Ticket[Payload]) -> bool:
        """Free the place of a ticket. False if it has none any more."""
        with self._changed:
            if ticket not in self._lanes.get(ticket.key, ()):
                return False
            self._remove(ticket)
            return True

    def close(self) -> list[Ticket[Payload]]:
        """Refuse tickets from now on. Returns those that wait, which can still be taken or removed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return [ticket for lane in self._lanes.values() for ticket in lane]

    def _kept_from(self, key: str, count: int) -> int:
        """Places that `key` leaves free for keys that have no ticket here: none if this is its own first one."""
        if count == 1 and key not in self._lanes:
            return 0
        return len(self._keys - self._lanes.keys() - {key})

    def _fill(self, batch: list[Ticket[Payload]], most: int) -> None:
        """Move tickets of the batch's group into it, one of each lane in turn."""
        while len(batch) < most:
            found = [ticket for lane in self._lanes.values() if (ticket := _first(lane, batch[0].group)) is not None]
            for ticket in found[: most - len(batch)]:
                self._remove(ticket, to_the_end=True)
                batch.append(ticket)
            if not found:
                return

    def _remove(self, ticket: Ticket[Payload], *, to_the_end: bool = False) -> None:
        """Take a ticket out; its lane then waits behind the others."""
        lane = self._lanes[ticket.key]
        del lane[ticket]
        self._count -= 1
        if not lane:
            del self._lanes[ticket.key]
        elif to_the_end:
            self._lanes.move_to_end(ticket.key)


def _first(lane: OrderedDict[Ticket[Payload], None], group: Hashable) -> Ticket[Payload] | None:
    return next((ticket for ticket in lane if ticket.group == group), None)
