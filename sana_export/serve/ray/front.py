"""`FrontReplica`: a replica with the HTTP application of the single process, over the drawing replicas."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ray import serve

from sana_export.serve.app import create_app
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray.engine import RayEngine
from sana_export.serve.security import Application, Message, Receive, Send

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

LOG = logging.getLogger(__name__)
#: The name of the deployment of drawing replicas.
DRAWING = "Drawing"
#: What Ray calls the state of a replica that takes requests.
RUNNING = "RUNNING"
#: Seconds between two questions to Ray about them.
WATCH_SECONDS = 2.0


class FrontReplica:
    """A deployment of Ray Serve, with `serve.ingress()`."""

    async def __init__(self, drawing: DeploymentHandle[Any], config: RayConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        """Wait for the first drawing replica: it knows the models."""
        self._config = config
        self._keys = config.keys()
        models = await drawing.models.remote()
        draw = drawing.options(method_name="draw", stream=True)
        self._engine = RayEngine(draw.remote, models, config.max_queued_requests, self._keys)
        self._watching = asyncio.create_task(self._watch()) if config.least_replicas else None

    async def _watch(self) -> None:
        """Tell the engine whether a drawing replica runs, again and again."""
        application = serve.get_replica_context().app_name
        while True:
            try:
                self._engine.note_running(await asyncio.to_thread(running_replicas, application))
            except Exception as error:  # any: Ray's controller may be away for a while
                LOG.warning("Ray does not say how many drawing replicas run: %s", error)
            await asyncio.sleep(WATCH_SECONDS)

    def __serve_build_asgi_app__(self) -> Application:
        return OneRequestId(create_app(self._engine, self._config.in_front(self._keys)))


def running_replicas(application: str) -> int:
    """How many drawing replicas of an application run, as Ray's controller says. May take a while."""
    states = serve.status().applications[application].deployments[DRAWING].replica_states
    return sum(count for state, count in states.items() if state == RUNNING)


class OneRequestId:
    """Leaves the header X-Request-Id of answers to Serve's proxy, which adds it whether there is one or not."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """As of ASGI."""

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message["headers"] if name.lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_without)
