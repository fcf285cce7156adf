"""Jobs that wait in a front replica: how many, and in which order they come to Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

pytest.importorskip("ray")

from sana_export.serve.errors import Refusal
from sana_export.serve.ray.places import Places, WaitingJob


def run(case: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(case(), 5))  # type: ignore[arg-type]


class Jobs:
    """Jobs that come to the door, in the order in which they do."""

    def __init__(self, places: Places) -> None:
        self.places, self.order = places, list[str]()
        self.at_door: list[WaitingJob] = []

    def come(self, name: str) -> asyncio.Task[None]:
        """A job; its key is the first letter of its name."""
        place = self.places.take(name[0])

        async def wait() -> None:
            try:
                await place.come_to_door()
            except BaseException:
                place.leave()
                raise
            self.order.append(name)
            self.at_door.append(place)

        return asyncio.create_task(wait())

    async def accept(self) -> None:
        """A replica accepts the job that has been at the door for the longest."""
        self.at_door.pop(0).leave()
        await asyncio.sleep(0.001)


def test_keys_take_turns_and_jobs_of_one_key_keep_their_order():
    async def case() -> None:
        jobs = Jobs(Places(20, (), at_door=2))
        for name in ("a1", "a2", "a3", "a4", "a5", "b1", "b2", "c1"):
            jobs.come(name)
            await asyncio.sleep(0)
        await asyncio.sleep(0.001)
        assert jobs.order == ["a1", "a2"]  # the door was free
        while jobs.at_door:
            await jobs.accept()
        assert jobs.order == ["a1", "a2", "a3", "b1", "c1", "a4", "b2", "a5"]
        assert len(jobs.places) == 0

    run(case)


def test_places_are_counted_until_a_replica_accepts():
    async def case() -> None:
        jobs = Jobs(Places(3, (), at_door=1))
        for name in ("a1", "a2", "b1"):
            jobs.come(name)
        await asyncio.sleep(0.001)
        with pytest.raises(Refusal, match="all 3 places"):
            jobs.come("c1")
        await jobs.accept()
        assert len(jobs.places) == 2
        jobs.come("c1")

    run(case)


def test_each_key_can_have_one_job_however_many_another_has():
    places = Places(4, ("a", "b", "c"), at_door=1)
    kept = [places.take("a"), places.take("a")]
    with pytest.raises(Refusal):
        places.take("a")
    kept.append(places.take("b"))
    with pytest.raises(Refusal):
        places.take("b")
    kept.append(places.take("c"))
    for place in kept:
        place.leave()
        place.leave()  # a second time means nothing
    assert len(places) == 0


def test_jobs_that_leave_while_they_wait_block_nobody():
    async def case() -> None:
        jobs = Jobs(Places(9, (), at_door=1))
        tasks = {name: jobs.come(name) for name in ("a1", "a2", "a3", "b1")}
        await asyncio.sleep(0.001)
        tasks["a2"].cancel()
        await asyncio.sleep(0.001)
        assert len(jobs.places) == 3
        jobs.at_door.pop(0).leave()  # it is the turn of a3, which leaves at the same moment
        tasks["a3"].cancel()
        await asyncio.sleep(0.001)
        assert jobs.order == ["a1", "b1"]
        await jobs.accept()
        jobs.come("c1")
        await asyncio.sleep(0.001)
        assert jobs.order == ["a1", "b1", "c1"]

    run(case)
