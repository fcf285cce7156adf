"""The queue: its bound, turns of keys, and batches."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sana_export.serve.errors import Refusal
from sana_export.serve.queue import FairQueue, Ticket
from tests.support.serving import wait_for


def ticket(key: str, payload: object, group: object = None) -> Ticket[Any]:
    return Ticket(key, group, payload)


def filled(*tickets: Ticket[Any], places: int = 100, keys: tuple[str, ...] = ()) -> FairQueue[Any]:
    queue: FairQueue[Any] = FairQueue(places, keys)
    for each in tickets:
        queue.put([each])
    return queue


def taken(queue: FairQueue[Any], most: int = 1) -> list[list[Any]]:
    """What leaves the queue until it is empty."""
    found = []
    while len(queue):
        found.append([each.payload for each in queue.take(most)])
    return found


def test_keys_take_turns_and_each_keeps_its_order() -> None:
    queue = filled(*(ticket("a", f"a{index}") for index in range(4)), ticket("b", "b0"), ticket("c", "c0"), ticket("b", "b1"))
    assert taken(queue) == [["a0"], ["b0"], ["c0"], ["a1"], ["b1"], ["a2"], ["a3"]]


def test_a_batch_has_one_group_and_takes_from_all_keys_in_turn() -> None:
    queue = filled(
        *(ticket("a", f"a{index}", "x") for index in range(3)),
        ticket("b", "b0", "y"),
        ticket("b", "b1", "x"),
        ticket("c", "c0", None),
        ticket("c", "c1", "x"),
    )
    assert taken(queue, most=4) == [["a0", "b1", "c1", "a1"], ["b0"], ["c0"], ["a2"]]


def test_tickets_without_a_group_leave_alone() -> None:
    assert taken(filled(ticket("a", 1), ticket("a", 2), ticket("b", 3)), most=8) == [[1], [3], [2]]


def test_a_full_queue_refuses_all_images_of_a_request_or_none() -> None:
    queue = filled(ticket("", 1), ticket("", 2), places=3)
    with pytest.raises(Refusal) as caught:
        queue.put([ticket("", 3), ticket("", 4)])
    assert (caught.value.code, len(queue)) == ("queue_full", 2)
    assert queue.put([ticket("", 3)]) == 2
    with pytest.raises(Refusal):
        queue.put([ticket("", 4)])


def test_one_key_cannot_take_the_places_of_the_others() -> None:
    queue: FairQueue[Any] = FairQueue(5, ("a", "b", "c"))
    for index in range(3):
        queue.put([ticket("a", index)])
    with pytest.raises(Refusal):
        queue.put([ticket("a", 3)])
    queue.put([ticket("b", 0)])
    with pytest.raises(Refusal):  # the last place is for c
        queue.put([ticket("b", 1)])
    queue.put([ticket("c", 0)])
    assert len(queue) == 5


def test_a_removed_ticket_frees_its_place_once() -> None:
    first, second = ticket("a", 1), ticket("a", 2)
    queue = filled(first, second, places=2)
    assert queue.remove(first)
    assert not queue.remove(first)
    queue.put([ticket("b", 3)])
    assert taken(queue) == [[2], [3]]
    assert not queue.remove(second)


def test_an_incomplete_batch_waits_for_a_while_and_no_longer() -> None:
    now, waits = [10.0], []
    queue: FairQueue[Any] = FairQueue(10, clock=lambda: now[0])
    queue.put([ticket("a", 1, "x")])

    def passing(seconds: float) -> None:
        """In place of the condition's wait: a ticket comes with each of the first two, then the time is over."""
        waits.append(seconds)
        if len(waits) <= 2:
            now[0] += 0.25
            queue.put([ticket("b", 1 + len(waits), "x" if len(waits) == 1 else "y")])
        else:
            now[0] += seconds

    queue._changed.wait = passing  # type: ignore[method-assign, assignment]
    assert [each.payload for each in queue.take(4, wait=1.0)] == [1, 2]
    assert waits == [1.0, 0.75, 0.5]


def test_who_takes_waits_for_a_ticket() -> None:
    queue: FairQueue[Any] = FairQueue(10)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(queue.take()))
    thread.start()
    queue.put([ticket("a", 5)])
    thread.join(10)
    assert [each.payload for each in found] == [5]


def test_a_closed_queue_takes_nothing_and_hands_out_what_is_there() -> None:
    queue = filled(ticket("a", 1), ticket("b", 2))
    assert [each.payload for each in queue.close()] == [1, 2]
    with pytest.raises(Refusal) as caught:
        queue.put([ticket("a", 3)])
    assert caught.value.code == "shutting_down"
    assert taken(queue) == [[1], [2]]
    assert queue.take() == []

    empty: FairQueue[Any] = FairQueue(1)
    ended: list[Any] = []
    thread = threading.Thread(target=lambda: ended.append(empty.take()))
    thread.start()
    empty.close()
    thread.join(10)
    assert ended == [[]]


def test_ten_thousand_tickets_that_leave_take_no_time() -> None:
    tickets = [ticket(str(index % 7), index, "x") for index in range(10_000)]
    queue = filled(*tickets, places=10_000)
    done = threading.Event()

    def leave() -> None:
        for each in reversed(tickets):
            queue.remove(each)
        done.set()

    threading.Thread(target=leave, daemon=True).start()
    wait_for(done.is_set)
    assert len(queue) == 0
