"""`DrawingReplica`: a replica that draws. It holds the engine of a single process, with its queue, its batches and its models."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import ray

from sana_export.serve.engine import Finished, ImageJob, JobEvent, ModelCard
from sana_export.serve.errors import Refusal
from sana_export.serve.metrics import gpu_memory
from sana_export.serve.ray.config import RayConfig
from sana_export.serve.ray.messages import Failed, ReplicaReport
from sana_export.serve.worker import LocalEngine

#: The API key of health checks: they take turns with those of requests.
HEALTH = "health check"


class DrawingReplica:
    """A deployment of Ray Serve. Ray calls its methods from one event loop, and removes a replica whose `check_health` raises."""

    async def __init__(self, config: RayConfig) -> None:  # type: ignore[misc]  # Ray awaits it
        self._config = config
        self._engine = LocalEngine(config.in_replica())
        #: When the last image was finished.
        self._finished = -math.inf
        #: The health check that was too slow, if no image was finished since.
        self._hangs: Refusal | None = None
        self._checking = asyncio.Lock()
        await self.check_health()  # a replica that cannot draw never becomes ready

    async def models(self) -> tuple[ModelCard, ...]:
        """The models, for the front."""
        return self._engine.models()

    async def draw(self, job: ImageJob) -> AsyncGenerator[JobEvent | ReplicaReport | Failed, None]:
        """The events of a job. If Ray cancels the call, the job loses its place, and sampling stops at the next step."""
        try:
            async with aclosing(self._engine.submit(job)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        self._note_finished()
                        loaded = frozenset(card.name for card in self._engine.models() if card.loaded)
                        yield ReplicaReport(loaded, _gpu_memory())
                    yield event
        except Exception as error:  # any: the front decides what the client sees
            yield Failed(error)

    async def check_health(self) -> None:
        """Draw a small image, unless one was finished lately. Raises Refusal if it takes too long, or what drawing it raises.

        A replica that was too slow raises at once until it finishes an image: Ray replaces it after three failures in a row.
        """
        if time.monotonic() - self._finished < self._config.health_image_period:
            return
        async with self._checking:  # Ray may ask again before a check has ended
            if self._hangs is not None:
                raise self._hangs
            try:
                await self._draw_small_image()
            except Refusal as refusal:
                self._hangs = refusal if refusal.code == "timeout" else None
                raise

    async def _draw_small_image(self) -> None:
        config = self._config
        words: dict[str, object] = {"prompt": "a red apple", "num_inference_steps": 1}
        if config.health_size is not None:
            words |= {"height": config.health_size, "width": config.health_size}
        job = ImageJob(self._engine.models()[0].name, words, seeds=(0,), timeout=config.longest_health_check, key=HEALTH)
        async with aclosing(self._engine.submit(job)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    self._note_finished()

    def _note_finished(self) -> None:
        self._finished, self._hangs = time.monotonic(), None

    def __del__(self) -> None:
        self._engine.close()


def _gpu_memory() -> dict[str, tuple[int, int]]:
    """Of the GPUs that Ray gave this replica."""
    own, machine = ray.get_runtime_context().get_accelerator_ids().get("GPU", []), ray.util.get_node_ip_address()
    return {f"{machine}/{gpu}": memory for gpu, memory in gpu_memory().items() if gpu in own}
