"""`RayEngine`: the engine of a front replica. It sends jobs to the drawing replicas, and once more if a replica dies.

A job is sent again at most once, with the seeds that it already has, so the second replica draws the same images. What the client
has received of the first is not sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from sana_export.serve.engine import Accepted, EngineStatus, Finished, ImageJob, JobEvent, ModelCard, Partial
from sana_export.serve.errors import Refusal
from sana_export.serve.ray.failures import ReplicaLost, meaning
from sana_export.serve.ray.messages import Failed, ReplicaReport

LOG = logging.getLogger(__name__)

#: A job is sent this often: again once, if the replica that draws it dies.
SENDS = 2
#: The memory of a GPU that no replica has reported for this many seconds is not shown.
REPORT_SECONDS = 300.0


class Answers(Protocol):
    """What Ray returns for a call of a method that yields: `ray.serve.handle.DeploymentResponseGenerator`."""

    async def __anext__(self) -> Any: ...

    def cancel(self) -> None: ...


#: Sends a job to a drawing replica, and returns an `Answers`.
Send = Callable[[ImageJob], Any]


@dataclass(eq=False)
class _Progress:
    """What the client has received of a job."""

    accepted: bool = False
    #: The index of the next preview, by image.
    previews: Counter[int] = field(default_factory=Counter)

    def is_new(self, event: JobEvent) -> bool:
        """Whether the client has not received `event` yet. Notes that it has now."""
        if isinstance(event, Accepted):
            new, self.accepted = not self.accepted, True
            return new
        if isinstance(event, Partial):
            if event.index < self.previews[event.image]:
                return False
            self.previews[event.image] = event.index + 1
        return True


class RayEngine:
    """Implements `Engine` (engine.py) with drawing replicas (replica.py)."""

    def __init__(self, send: Send, models: tuple[ModelCard, ...], places: int, key_places: int) -> None:
        """places: jobs that may wait for a replica. key_places: those of one API key."""
        self._send, self._models = send, models
        self._places, self._key_places = places, key_places
        self._waiting: Counter[str] = Counter()
        self._running = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        #: When the memory of a GPU was reported, and what.
        self._gpus: dict[str, tuple[float, tuple[int, int]]] = {}

    def models(self) -> tuple[ModelCard, ...]:
        """The models of the drawing replicas, the default one first."""
        return self._models

    async def submit(self, job: ImageJob) -> AsyncGenerator[JobEvent, None]:
        """As in `Engine`."""
        deadline = time.monotonic() + job.timeout
        progress = _Progress()
        with self._place(job.key) as start:
            for send in range(1, SENDS + 1):
                try:
                    async with aclosing(self._events(job, deadline)) as events:
                        async for event in events:
                            start()
                            if progress.is_new(event):
                                yield event
                    return
                except ReplicaLost as lost:
                    LOG.warning("request %s: %s (%d of %d)", job.request_id, lost, send, SENDS)
        raise Refusal("not_ready", "two replicas in a row died while they drew this request; try again later")

    def status(self) -> EngineStatus:
        """Jobs are those of this front replica; GPU memory is what replicas reported with their last images."""
        recent = time.monotonic() - REPORT_SECONDS
        gpu_memory = {gpu: memory for gpu, (since, memory) in self._gpus.items() if since > recent}
        reason = "shutting down" if self._draining else ""
        return EngineStatus(not self._draining, reason, self._waiting.total(), self._running, self._places, gpu_memory)

    async def drain(self) -> None:
        """As in `Engine`."""
        self._draining = True
        await self._idle.wait()

    def close(self) -> None:
        """Nothing: Ray stops the replicas."""

    @contextmanager
    def _place(self, key: str) -> Iterator[Callable[[], None]]:
        """A place among the jobs that wait. The function that it gives moves the job to those that run.

        Raises Refusal, "queue_full" or "shutting_down", if there is none.
        """
        if self._draining:
            raise Refusal("shutting_down", "the server is shutting down")
        if self._waiting.total() >= self._places or self._waiting[key] >= self._key_places:
            raise Refusal("queue_full", "the queue is full; try again later")
        waits = True
        self._waiting[key] += 1
        self._idle.clear()

        def start() -> None:
            nonlocal waits
            if waits:
                self._waiting[key] -= 1
                self._running += 1
            waits = False

        try:
            yield start
        finally:
            start()
            self._running -= 1
            if not self._running and not self._waiting.total():
                self._idle.set()

    async def _events(self, job: ImageJob, deadline: float) -> AsyncGenerator[JobEvent, None]:
        """What one replica yields for a job. Raises ReplicaLost, or what the replica or Ray refuses the job with."""
        answers: Answers = self._send(replace(job, timeout=_seconds_until(deadline)))
        ended = False
        try:
            while not ended:
                item = await _next(answers, deadline)
                ended = item is None or isinstance(item, Failed | Finished)
                if isinstance(item, Failed):
                    raise item.error
                if isinstance(item, ReplicaReport):
                    self._gpus |= {gpu: (time.monotonic(), memory) for gpu, memory in item.gpu_memory.items()}
                elif item is not None:
                    yield item
        finally:
            if not ended:  # the client left, the time is up, or the replica cannot be reached: it may be drawing
                answers.cancel()


async def _next(answers: Answers, deadline: float) -> Any:
    """The next item, or None after the last. Raises ReplicaLost or a Refusal for what Ray raises."""
    try:
        return await asyncio.wait_for(answers.__anext__(), _seconds_until(deadline))
    except StopAsyncIteration:
        return None
    except TimeoutError as error:
        raise Refusal("timeout", "the request took too long") from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost("the replica stopped drawing") from None
    except Exception as error:  # any: what Ray can raise is in failures.py
        raise meaning(error) from error


def _seconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
