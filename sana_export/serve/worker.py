"""An `Engine` in this process: one thread decodes uploads and draws, others plan requests and encode images.

A second drawing thread would only wait for the runtime, which one call uses at a time.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from PIL import Image

from sana_export.errors import UsageError
from sana_export.runtime import Request
from sana_export.runtime.batches import batch_key
from sana_export.runtime.plan import make_plan
from sana_export.serve.config import ServeConfig
from sana_export.serve.drawing import DrawingThread, EncodedImage, ImageTask
from sana_export.serve.engine import Accepted, EngineStatus, Finished, ImageJob, JobEvent, ModelCard
from sana_export.serve.errors import Refusal, usage_refusal
from sana_export.serve.filters import ContentFilters
from sana_export.serve.images import check_uploads
from sana_export.serve.models import ModelStore
from sana_export.serve.queue import FairQueue, Ticket

LOG = logging.getLogger(__name__)
#: Threads that check and plan requests, and threads that encode images.
READERS, ENCODERS = 2, 2
#: The longest time that a client is told to wait.
_MOST_RETRY = 3600.0


class LocalEngine:
    """Draws with the models of a configuration."""

    def __init__(self, config: ServeConfig, *, store: ModelStore | None = None, filters: ContentFilters | None = None) -> None:
        """Find the models and start the threads. Nothing is loaded before `load` or the first job.

        Raises the errors of `ModelStore` and `ContentFilters.load`.
        """
        self._config = config
        self._store = ModelStore(config.models, config.memory_budget, hub=config.hub) if store is None else store
        self._filters = ContentFilters.load(config.content_filters) if filters is None else filters
        self._queue: FairQueue[ImageTask] = FairQueue(config.queue.places, config.keys)
        self._readers = ThreadPoolExecutor(READERS, "sana-export-read")
        self._encoders = ThreadPoolExecutor(ENCODERS, "sana-export-encode")
        self._drawing = DrawingThread(config, self._queue, self._store, self._filters, self._encoders)
        self._draining = False
        self._jobs, self._closing = 0, threading.Lock()
        self._idle = asyncio.Event()

    def load(self) -> None:
        """Load the default model, before the first job. Raises what its bundle raises."""
        self._store.use(next(iter(self._store.known)))

    def models(self) -> tuple[ModelCard, ...]:
        return self._store.cards()

    def status(self) -> EngineStatus:
        reason = "shutting down" if self._draining else self._drawing.problem
        return EngineStatus(not reason, reason, len(self._queue), len(self._drawing.running), self._config.queue.places)

    async def submit(self, job: ImageJob) -> AsyncGenerator[JobEvent, None]:
        """See `Engine.submit`."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        until, tickets = loop.time() + job.timeout, list[Ticket[ImageTask]]()
        self._jobs += 1
        try:
            self._check_open(job)
            async with asyncio.timeout_at(until):
                tickets = await loop.run_in_executor(self._readers, self._prepare, job, partial(_post, loop, events))
            yield Accepted(self._put(tickets))
            drawn: dict[int, EncodedImage] = {}
            while len(drawn) < len(tickets):
                async with asyncio.timeout_at(until):
                    event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, EncodedImage):
                    drawn[event.image] = event
                else:
                    yield event
            yield _finished(job, [drawn[image] for image in range(len(tickets))])
        except TimeoutError:
            raise Refusal("timeout", f"the image was not ready after {job.timeout:g} seconds") from None
        finally:
            for ticket in tickets:
                ticket.left = True
                self._queue.remove(ticket)
            self._jobs -= 1
            self._idle.set()

    async def drain(self) -> None:
        """See `EndingEngine.drain`. A job with an image that is being drawn, or has been, is running."""
        self._draining = True
        waiting = self._queue.close()
        images = Counter(ticket.payload.post for ticket in waiting)
        self._refuse(ticket for ticket in waiting if images[ticket.payload.post] == len(ticket.payload.job.seeds))
        while self._jobs:
            self._idle.clear()
            await self._idle.wait()

    def close(self) -> None:
        """See `EndingEngine.close`. What runs has `drawing.STEP_SECONDS` to reach its next step."""
        self._draining = True
        running = self._drawing.running
        self._refuse(self._queue.close())
        for ticket in running:
            ticket.payload.post(_ending())
        with self._closing:  # from the thread that stops requests, and from the one that ends the process
            stopped = self._drawing.stop()
            for pool in (self._readers, self._encoders):
                pool.shutdown(cancel_futures=True)
            if stopped:
                self._store.close()
            else:
                LOG.error("a step does not end: the models are not closed")

    def _refuse(self, tickets: Iterable[Ticket[ImageTask]]) -> None:
        for ticket in tickets:
            if self._queue.remove(ticket):
                ticket.payload.post(_ending())

    def _check_open(self, job: ImageJob) -> None:
        """Raise Refusal for a job that has no chance, before anything is computed for it."""
        if self._draining:
            raise _ending()
        if len(self._queue) >= self._config.queue.places:
            raise self._with_delay(Refusal("queue_full", "the queue is full; try again later"))
        known = self._store[job.model]
        if job.image is not None and not known.edits:
            raise Refusal("invalid_value", f"the model {job.model!r} cannot start from images", param="model")

    def _put(self, tickets: Sequence[Ticket[ImageTask]]) -> int:
        try:
            return self._queue.put(tickets)
        except Refusal as refusal:
            raise self._with_delay(refusal) from None

    def _with_delay(self, refusal: Refusal) -> Refusal:
        """A refusal "queue_full" that says when half of the queue is drawn, by the last images."""
        if refusal.code == "queue_full":
            refusal.retry_after = min(math.ceil(len(self._queue) * self._drawing.seconds_per_image / 2), _MOST_RETRY)
        return refusal

    def _prepare(self, job: ImageJob, post: Callable[[Any], None]) -> list[Ticket[ImageTask]]:
        """A ticket for each image of a job, in a thread of its own. Raises Refusal for what the model cannot draw."""
        known, words = self._store[job.model], job.words
        self._filters.check_prompt(str(words.get("prompt", "")), str(words.get("negative_prompt") or ""))
        try:
            check_uploads(job.image, job.mask, self._config.limits.source_pixels)
            plan = make_plan(Request(**words, **_stand_ins(job), seed=job.seeds[0]), known.folder, known.manifest)
        except UsageError as error:
            raise usage_refusal(error, {str(known.folder): job.model}) from error
        key = None if job.partial_images else batch_key(plan)
        group = None if key is None else (job.model, key)
        steps, size = len(plan.schedule.timesteps), (plan.output_width, plan.output_height)
        return [Ticket(job.key, group, ImageTask(job, index, steps, size, post)) for index in range(len(job.seeds))]


def _stand_ins(job: ImageJob) -> dict[str, Any]:
    """Black images in place of a job's uploads, which are decoded when their turn to be drawn has come."""
    size = job.words.get("width", 1), job.words.get("height", 1)
    return {name: Image.new("L", size) for name, content in (("image", job.image), ("mask", job.mask)) if content is not None}


def _ending() -> Refusal:
    return Refusal("shutting_down", "the server is shutting down")


def _post(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Any], event: Any) -> None:
    with suppress(RuntimeError):  # the loop is closed, so nobody waits
        loop.call_soon_threadsafe(events.put_nowait, event)


def _finished(job: ImageJob, drawn: Sequence[EncodedImage]) -> Finished:
    """The last event, with the seconds of the image that took the longest."""
    last = max(drawn, key=lambda image: image.seconds["queue"])
    contents = tuple(image.content for image in drawn)
    return Finished(contents, job.seeds, last.height, last.width, last.seconds, max(image.batch for image in drawn))
