"""`RayEngine`: the engine of a front replica. It sends jobs to the drawing replicas, and once more if a replica dies.

A job is sent again at most once, with the seeds that it already has, so the second replica draws the same images. What the client
has received of the first is not sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from sana_export.serve.engine import Accepted, EngineStatus, Finished, ImageJob, JobEvent, ModelCard, Partial
from sana_export.serve.errors import Refusal
from sana_export.serve.ray.failures import ReplicaLost, meaning
from sana_export.serve.ray.messages import Failed, ReplicaReport
from sana_export.serve.ray.places import Places

Result = TypeVar("Result")
LOG = logging.getLogger(__name__)

#: A job is sent this often: again once, if the replica that draws it dies.
SENDS = 2
#: Jobs that wait in Ray's own queue, which does not let API keys take turns. Enough for replicas to find one when they want it.
AT_DOOR = 4
#: The longest time after which a refused client is asked to come back.
MOST_RETRY_SECONDS = 60.0
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

    def __init__(self, send: Send, models: tuple[ModelCard, ...], places: int, keys: Collection[str] = ()) -> None:
        """places: jobs that may wait for a replica. keys: the ids of all API keys."""
        self._send, self._models, self._most = send, models, places
        self._places = Places(places, keys, AT_DOOR)
        #: Jobs that wait or run.
        self._jobs = 0
        #: Whether a drawing replica ran when Ray was last asked.
        self._any_runs = True
        #: When the last jobs were finished.
        self._finished: deque[float] = deque(maxlen=16)
        #: When the memory of a GPU was reported, and what.
        self._gpus: dict[str, tuple[float, tuple[int, int]]] = {}

    def models(self) -> tuple[ModelCard, ...]:
        """The models of the drawing replicas, the default one first. Loaded: in the replica that finished the last image."""
        return self._models

    async def submit(self, job: ImageJob) -> AsyncGenerator[JobEvent, None]:
        """As in `Engine`."""
        deadline, progress = time.monotonic() + job.timeout, _Progress()
        with self._places.take(job.key, self._retry_after()) as place, self._counted():
            await _in_time(place.come_to_door(), deadline)
            for send in range(1, SENDS + 1):
                try:
                    async with aclosing(self._events(job, deadline)) as events:
                        async for event in events:
                            place.leave()
                            if progress.is_new(event):
                                yield event
                    return
                except ReplicaLost as lost:
                    LOG.warning("request %s: %s (%d of %d)", job.request_id, lost, send, SENDS)
        raise Refusal("not_ready", "two replicas in a row died while they drew this request; try again later")

    def status(self) -> EngineStatus:
        """Jobs are those of this front replica; GPU memory is what replicas reported with their last images."""
        recent, waiting = time.monotonic() - REPORT_SECONDS, len(self._places)
        gpu_memory = {gpu: memory for gpu, (since, memory) in self._gpus.items() if since > recent}
        reason = "" if self._any_runs else "no drawing replica runs; `serve status` says why"
        return EngineStatus(not reason, reason, waiting, self._jobs - waiting, self._most, gpu_memory)

    def note_running(self, replicas: int) -> None:
        """How many drawing replicas run. With none, jobs wait for one, and the engine is not ready."""
        if bool(replicas) != self._any_runs:
            LOG.warning("drawing replicas that run: %d", replicas)
        self._any_runs = bool(replicas)

    def _retry_after(self) -> float | None:
        """Seconds until half of the queue is drawn, by the last jobs that were finished. None: too few were."""
        times = self._finished
        return None if len(times) < 2 else min((times[-1] - times[0]) / (len(times) - 1) * self._most / 2, MOST_RETRY_SECONDS)

    def _note(self, report: ReplicaReport) -> None:
        self._finished.append(time.monotonic())
        self._models = tuple(replace(card, loaded=card.name in report.loaded) for card in self._models)
        self._gpus |= {gpu: (time.monotonic(), memory) for gpu, memory in report.gpu_memory.items()}

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._jobs += 1
        try:
            yield
        finally:
            self._jobs -= 1

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
                    self._note(item)
                elif item is not None:
                    yield item
        finally:
            if not ended:  # the client left, the time is up, or the replica cannot be reached: it may be drawing
                answers.cancel()


async def _next(answers: Answers, deadline: float) -> Any:
    """The next item, or None after the last. Raises ReplicaLost or a Refusal for what Ray raises."""
    try:
        return await _in_time(answers.__anext__(), deadline)
    except StopAsyncIteration:
        return None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ReplicaLost("the replica stopped drawing") from None
    except Exception as error:  # any: what Ray can raise is in failures.py
        raise meaning(error) from error


async def _in_time(work: Coroutine[Any, Any, Result], deadline: float) -> Result:
    """The result of `work`, which is cancelled at the deadline: Refusal "timeout"."""
    try:
        return await asyncio.wait_for(work, _seconds_until(deadline))
    except TimeoutError as error:
        raise Refusal("timeout", "the image was not ready in time") from error


def _seconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
