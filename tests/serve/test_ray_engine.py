"""RayEngine with a stand-in for Ray's handle: what is sent, what is sent again, and what clients get when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from sana_export.errors import UsageError
from sana_export.serve.engine import Accepted, Finished, ImageJob, JobEvent, ModelCard, Partial
from sana_export.serve.errors import Refusal, answer
from sana_export.serve.ray.engine import RayEngine
from sana_export.serve.ray.messages import Failed, ReplicaReport

JOB = ImageJob("tiny", {"prompt": "a red apple"}, seeds=(3, 4), timeout=5.0, request_id="r1")
MODELS = (ModelCard("tiny", 0, edits=False, native_size=128),)
FINISHED = Finished((b"one", b"two"), (3, 4), 128, 128, {"queue": 0.5})


class Handle:
    """Stands in for `handle.options(stream=True).draw`: each call yields the items of the next script, or raises one of them."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.scripts, self.jobs, self.cancelled = list(scripts), [], 0

    def remote(self, job: ImageJob) -> Any:
        self.jobs.append(job)
        handle, items = self, iter(self.scripts.pop(0))

        class Generator:
            async def __anext__(self) -> Any:
                for item in items:
                    if isinstance(item, BaseException):
                        raise item
                    if isinstance(item, float):
                        await asyncio.sleep(item)
                        continue
                    return item
                raise StopAsyncIteration

            def cancel(self) -> None:
                handle.cancelled += 1

        return Generator()


def engine(*scripts: list[Any], places: int = 2, keys: Sequence[str] = ()) -> tuple[RayEngine, Handle]:
    handle = Handle(*scripts)
    return RayEngine(handle.remote, MODELS, places, keys), handle


async def drawn(events: AsyncIterator[JobEvent]) -> list[JobEvent]:
    return [event async for event in events]


def run(case: Callable[[], Any]) -> Any:
    return asyncio.run(case())


def died() -> ActorDiedError:
    return ActorDiedError()


def test_a_job_that_died_with_its_replica_is_sent_once_more_and_nothing_reaches_the_client_twice():
    first = [Accepted(0), Partial(0, 0, b"a"), Partial(1, 0, b"b"), died()]
    second = [Accepted(2), Partial(0, 0, b"a"), Partial(1, 0, b"b"), Partial(0, 1, b"c"), FINISHED]

    async def case() -> None:
        ray, handle = engine(first, second)
        events = await drawn(ray.submit(JOB))
        assert events == [Accepted(0), Partial(0, 0, b"a"), Partial(1, 0, b"b"), Partial(0, 1, b"c"), FINISHED]
        assert [(job.seeds, job.words, job.request_id) for job in handle.jobs] == [((3, 4), JOB.words, "r1")] * 2
        assert handle.jobs[1].timeout <= handle.jobs[0].timeout <= 5.0

    run(case)


@pytest.mark.parametrize(
    "lost", [died(), ActorUnavailableError("no connection", None), TaskCancelledError(), asyncio.CancelledError()]
)
def test_every_way_of_losing_a_replica_is_one_retry(lost: BaseException):
    async def case() -> None:
        ray, handle = engine([Accepted(0), lost], [Accepted(0), FINISHED])
        assert await drawn(ray.submit(JOB)) == [Accepted(0), FINISHED]
        assert len(handle.jobs) == 2

    run(case)


def test_the_second_death_is_an_error_that_asks_to_come_back():
    async def case() -> None:
        ray, handle = engine([Accepted(0), died()], [died()], [FINISHED])
        with pytest.raises(Refusal, match="two replicas in a row died") as caught:
            await drawn(ray.submit(JOB))
        reply = answer(caught.value)
        assert (reply.status, reply.body["error"]["type"], reply.headers["Retry-After"]) == (503, "server_error", "5")
        assert len(handle.jobs) == 2
        assert ray.status().running == ray.status().waiting == 0

    run(case)


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (BackPressureError(4, 4), 429, "queue_full"),
        (DeploymentUnavailableError("Drawing"), 503, "not_ready"),
        (RayTaskError("draw", "Traceback: /secret/path", ValueError("/secret/path")), 500, "internal_error"),
        (Failed(UsageError("size", found="7", wanted="a multiple of 32")), 400, "invalid_value"),
        (Failed(Refusal("timeout", "the request took too long")), 504, "timeout"),
    ],
)  # fmt: skip
def test_what_ray_raises_and_replicas_send_becomes_an_error_of_openai_and_is_not_sent_again(raised: Any, status: int, code: str):
    async def case() -> None:
        ray, handle = engine([raised])
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the kinds differ
            await drawn(ray.submit(JOB))
        reply = answer(caught.value)
        assert (reply.status, reply.code) == (status, code)
        assert "/secret" not in str(reply.body)
        assert ("Retry-After" in reply.headers) == (status in (429, 503))
        assert len(handle.jobs) == 1

    run(case)


def test_a_full_queue_refuses_at_once_and_one_key_cannot_fill_it():
    async def case() -> None:
        ray, handle = engine([1.0, FINISHED], [1.0, FINISHED], [1.0, FINISHED], places=3, keys=("a", "b"))
        a = ImageJob("tiny", {}, (0,), timeout=9.0, key="a")
        b = ImageJob("tiny", {}, (0,), timeout=9.0, key="b")
        waiting = [asyncio.create_task(drawn(ray.submit(job))) for job in (a, a)]
        await asyncio.sleep(0.05)
        assert ray.status().waiting == 2
        with pytest.raises(Refusal) as caught:
            await drawn(ray.submit(a))
        assert caught.value.code == "queue_full"
        waiting.append(asyncio.create_task(drawn(ray.submit(b))))
        await asyncio.sleep(0.05)
        with pytest.raises(Refusal):
            await drawn(ray.submit(ImageJob("tiny", {}, (0,), timeout=9.0, key="c")))
        assert len(handle.jobs) == 3
        for task in waiting:
            assert await task == [FINISHED]
        assert ray.status().waiting == ray.status().running == 0

    run(case)


def test_a_job_past_its_time_is_cancelled_in_the_replica():
    async def case() -> None:
        ray, handle = engine([Accepted(0), 5.0, FINISHED])
        started = asyncio.get_running_loop().time()
        with pytest.raises(Refusal) as caught:
            await drawn(ray.submit(ImageJob("tiny", {}, (0,), timeout=0.1)))
        assert answer(caught.value).status == 504
        assert asyncio.get_running_loop().time() - started < 1.0
        assert handle.cancelled == 1

    run(case)


def test_a_client_that_leaves_cancels_the_job_in_the_replica_and_is_not_served_by_another():
    async def case() -> None:
        ray, handle = engine([Accepted(0), 5.0, FINISHED], [FINISHED])
        client = asyncio.create_task(drawn(ray.submit(JOB)))
        await asyncio.sleep(0.05)
        assert ray.status().running == 1
        client.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client
        assert (handle.cancelled, len(handle.jobs)) == (1, 1)
        events = ray.submit(JOB)
        handle.scripts = [[Accepted(0), FINISHED]]
        assert await anext(events) == Accepted(0)
        await events.aclose()
        assert handle.cancelled == 2
        assert ray.status().running == ray.status().waiting == 0

    run(case)


def test_a_finished_job_is_not_cancelled_and_replicas_report_their_state():
    async def case() -> None:
        ray, handle = engine([Accepted(0), ReplicaReport(frozenset({"tiny"}), {"10.0.0.7/0": (5, 80)}), FINISHED])
        assert await drawn(ray.submit(JOB)) == [Accepted(0), FINISHED]
        assert handle.cancelled == 0
        assert ray.models() == (replace(MODELS[0], loaded=True),)
        assert ray.status().gpu_memory == {"10.0.0.7/0": (5, 80)}

    run(case)


def test_without_a_running_replica_it_is_not_ready_and_says_why():
    async def case() -> None:
        ray, _ = engine()
        assert ray.status().ready
        for running in (0, 2, 0):
            ray.note_running(running)
            assert (ray.status().ready, bool(ray.status().reason)) == (running > 0, running == 0)
        assert "no drawing replica runs" in ray.status().reason

    run(case)


def test_a_full_queue_asks_to_come_back_when_half_of_it_is_drawn():
    async def case() -> None:
        report = ReplicaReport(frozenset(), {})
        ray, _ = engine(*[[Accepted(0), 0.05, report, FINISHED]] * 4, [5.0], *[[5.0]] * 80, places=80)
        for _ in range(4):
            await drawn(ray.submit(JOB))
        clients = [asyncio.create_task(drawn(ray.submit(JOB))) for _ in range(80)]
        await asyncio.sleep(0.01)
        with pytest.raises(Refusal) as caught:
            await drawn(ray.submit(JOB))
        assert 2.0 <= caught.value.retry_after < 4.0  # 40 jobs, 0.05 s and a little more each
        for client in clients:
            client.cancel()

    run(case)
