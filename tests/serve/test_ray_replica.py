"""A drawing replica with a stand-in for the engine: what it yields, and when it counts as healthy."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from sana_export.errors import ArtifactError, Cancelled, DependencyError, UsageError
from sana_export.serve.engine import Accepted, Finished, ImageJob, ModelCard
from sana_export.serve.errors import Refusal, answer
from sana_export.serve.ray import replica as module
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray.messages import Failed, ReplicaReport
from sana_export.serve.ray.replica import DrawingReplica

FINISHED = Finished((b"image",), (0,), 128, 128, {})


class StandIn:
    """An engine that finishes a job, raises, or finishes it too late."""

    def __init__(self, config: Any) -> None:
        self.config, self.jobs, self.closed, self.left = config, list[ImageJob](), False, 0
        self.error: Exception | None = None

    def models(self) -> tuple[ModelCard, ...]:
        return (
            ModelCard("tiny", 0, edits=False, native_size=128, loaded=True),
            ModelCard("other", 0, edits=False, native_size=128),
        )

    async def submit(self, job: ImageJob) -> AsyncGenerator[Any, None]:
        self.jobs.append(job)
        try:
            yield Accepted(0)
            if self.error is not None:
                raise self.error
            await asyncio.sleep(0.01)
            yield FINISHED
        finally:
            self.left += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LocalEngine", StandIn)
    monkeypatch.setattr(module, "_gpu_memory", lambda: {"10.0.0.7/0": (5, 80)})


async def started(**arguments: Any) -> tuple[DrawingReplica, Any]:
    config = RayConfig.model_validate({"bundle": "tiny", "allow_without_keys": True, **arguments})
    replica = DrawingReplica.__new__(DrawingReplica)
    await replica.__init__(config)  # type: ignore[misc]  # as Ray does
    return replica, replica._engine


def run(case: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(case(), 10))  # type: ignore[arg-type]


def test_a_replica_draws_a_small_image_before_it_takes_requests_and_when_it_is_idle(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    async def case() -> None:
        nonlocal now
        replica, engine = await started(health_image_period=20, health_size=64, health_timeout=9)
        assert [(job.words["height"], job.words["num_inference_steps"], job.timeout, job.model) for job in engine.jobs] == [
            (64, 1, 9, "tiny")
        ]
        await replica.check_health()
        assert len(engine.jobs) == 1  # the last image is fresh
        now += 25
        await asyncio.gather(replica.check_health(), replica.check_health())
        assert 2 <= len(engine.jobs) <= 3
        before = len(engine.jobs)
        now += 25
        _ = [event async for event in replica.draw(ImageJob("tiny", {}, (0,), 5.0))]
        await replica.check_health()
        assert len(engine.jobs) == before + 1  # a request's image shows the same

    run(case)


def test_a_replica_that_cannot_draw_never_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(StandIn, "__init__", _broken(StandIn.__init__, ArtifactError("the bundle is damaged")))

    async def case() -> None:
        with pytest.raises(ArtifactError, match="damaged"):
            await started()

    run(case)


def _broken(init: Any, error: Exception) -> Any:
    def broken(self: Any, config: Any) -> None:
        init(self, config)
        self.error = error

    return broken


def test_an_error_fails_one_check_and_a_hang_fails_all_until_an_image_is_finished():
    async def case() -> None:
        replica, engine = await started(health_image_period=0)
        engine.error = ArtifactError("once")
        with pytest.raises(ArtifactError):
            await replica.check_health()
        engine.error = None
        await replica.check_health()
        engine.error = Refusal("timeout", "too late")
        tried = len(engine.jobs)
        for _ in range(3):
            with pytest.raises(Refusal, match="too late"):
                await replica.check_health()
        assert len(engine.jobs) == tried + 1  # the other two failed at once
        engine.error = None
        _ = [event async for event in replica.draw(ImageJob("tiny", {}, (0,), 5.0))]
        await replica.check_health()

    run(case)


def test_errors_are_sent_and_not_raised_and_the_state_comes_with_the_image():
    async def case() -> None:
        replica, engine = await started()
        events = [event async for event in replica.draw(ImageJob("tiny", {}, (0,), 5.0))]
        assert events == [Accepted(0), ReplicaReport(frozenset({"tiny"}), {"10.0.0.7/0": (5, 80)}), FINISHED]
        engine.error = Refusal("content_policy_violation", "no")
        events = [event async for event in replica.draw(ImageJob("tiny", {}, (0,), 5.0))]
        assert events == [Accepted(0), Failed(engine.error)]

    run(case)


@pytest.mark.parametrize(
    "error",
    [
        Refusal("queue_full", "full", param="n", retry_after=7),
        UsageError("size", found="7", wanted="a multiple of 32", fix="sana-export build /bundle"),
        DependencyError("no memory", fix="--memory staged"),
        ArtifactError("the bundle is damaged"),
        Cancelled("the request was cancelled"),
    ],
)
def test_errors_of_replicas_mean_the_same_after_their_journey(error: Exception):
    travelled = pickle.loads(pickle.dumps(Failed(error))).error
    assert type(travelled) is type(error)
    assert (answer(travelled), str(travelled)) == (answer(error), str(error))


def test_a_call_that_ray_cancels_leaves_the_engine():
    async def case() -> None:
        replica, engine = await started()
        left = engine.left
        events = replica.draw(ImageJob("tiny", {}, (0,), 5.0))
        assert await anext(events) == Accepted(0)
        await events.aclose()
        assert engine.left == left + 1
        replica.__del__()
        assert engine.closed

    run(case)


def test_the_engine_inside_has_places_for_all_that_ray_sends(tmp_path: Path):
    async def case() -> None:
        _, engine = await started(max_ongoing_requests=3, limits={"images": 2})
        assert engine.config.queue.places == 7

    run(case)
