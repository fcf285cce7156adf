"""`FrontReplica`: a replica with the HTTP application of the single process, over the drawing replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sana_export.serve.app import create_app
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray.engine import RayEngine
from sana_export.serve.security import Application, Message, Receive, Send

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class FrontReplica:
    """A deployment of Ray Serve, with `serve.ingress()`."""

    async def __init__(self, drawing: DeploymentHandle[Any], config: RayConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        """Wait for the first drawing replica: it knows the models."""
        self._config = config
        self._keys = config.keys()
        models = await drawing.models.remote()
        draw = drawing.options(method_name="draw", stream=True)
        self._engine = RayEngine(draw.remote, models, config.max_queued_requests, self._keys)

    def __serve_build_asgi_app__(self) -> Application:
        return OneRequestId(create_app(self._engine, self._config.in_front(self._keys)))


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
