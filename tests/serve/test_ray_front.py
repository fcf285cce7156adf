"""A front replica with stand-ins for Ray: it is ready while Ray says that a drawing replica runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.serve.schema import ReplicaState

from sana_export.serve.engine import ModelCard
from sana_export.serve.ray import front
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray.front import FrontReplica

MODELS = (ModelCard("tiny", 0, edits=False, native_size=128),)


class Handle:
    """Stands in for the handle of the drawing replicas."""

    models = SimpleNamespace()
    remote = None

    def options(self, **_: Any) -> Handle:
        return self


async def _models() -> tuple[ModelCard, ...]:
    return MODELS


Handle.models.remote = _models


class Controller:
    """Stands in for Serve: it knows how many replicas of each state there are, or cannot be reached."""

    def __init__(self) -> None:
        self.states: dict[Any, int] | None = {ReplicaState.RUNNING: 2}
        self.asked = 0

    def get_replica_context(self) -> Any:
        return SimpleNamespace(app_name="sana")

    def status(self) -> Any:
        self.asked += 1
        if self.states is None:
            raise ConnectionError("the controller is away")
        drawing = SimpleNamespace(replica_states=self.states)
        return SimpleNamespace(applications={"sana": SimpleNamespace(deployments={"Drawing": drawing})})


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Controller:
    found = Controller()
    monkeypatch.setattr(front, "serve", found)
    monkeypatch.setattr(front, "WATCH_SECONDS", 0.01)
    return found


async def started(**arguments: Any) -> FrontReplica:
    config = RayConfig.model_validate({"bundle": "tiny", "allow_without_keys": True, **arguments})
    replica = FrontReplica.__new__(FrontReplica)
    await replica.__init__(Handle(), config)  # type: ignore[misc]  # as Ray does
    return replica


async def until_ready(replica: FrontReplica, ready: bool) -> None:
    async with asyncio.timeout(5):
        while replica._engine.status().ready != ready:
            await asyncio.sleep(0.005)


async def asked_again(controller: Controller) -> None:
    before = controller.asked
    async with asyncio.timeout(5):
        while controller.asked < before + 3:
            await asyncio.sleep(0.005)


def test_it_is_ready_while_a_drawing_replica_runs(controller: Controller, caplog: pytest.LogCaptureFixture) -> None:
    async def case() -> None:
        replica = await started()
        await asked_again(controller)
        assert replica._engine.status().ready
        controller.states = {ReplicaState.STARTING: 2, ReplicaState.STOPPING: 1}
        await until_ready(replica, False)
        assert "no drawing replica runs" in replica._engine.status().reason
        controller.states = None  # what was known last holds
        await asked_again(controller)
        assert not replica._engine.status().ready
        assert "the controller is away" in caplog.text
        controller.states = {ReplicaState.RUNNING: 1}
        await until_ready(replica, True)

    asyncio.run(case())


def test_without_replicas_to_keep_it_is_ready_when_none_runs(controller: Controller) -> None:
    """Autoscaling starts one for the first request."""

    async def case() -> None:
        controller.states = {}
        replica = await started(min_replicas=0, max_replicas=2)
        await asyncio.sleep(0.05)
        assert (replica._engine.status().ready, controller.asked) == (True, 0)

    asyncio.run(case())
