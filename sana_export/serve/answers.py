"""From what an engine yields to OpenAI's answers: one document, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from time import time
from typing import Any

from sana_export.errors import SanaExportError
from sana_export.serve.engine import Engine, Finished, ImageJob, JobEvent, Partial
from sana_export.serve.errors import answer
from sana_export.serve.images import OUTPUTS
from sana_export.serve.metrics import Metrics
from sana_export.serve.schema import GenerationBody, ImageItem, ImagesAnswer

LOG = logging.getLogger(__name__)
#: Stores an image file and its media type; returns its URL.
Store = Callable[[bytes, str], Awaitable[str]]


async def accepted(events: AsyncGenerator[JobEvent, None]) -> None:
    """Wait until the engine has accepted a job. Raises what it raises for one that it refuses."""
    await anext(events)


async def finished(engine: Engine, job: ImageJob) -> Finished:
    """Draw a job to its end. Raises what the engine raises."""
    async with aclosing(engine.submit(job)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event
    raise RuntimeError("the engine ended a job without its images")


async def document(body: GenerationBody, job: ImageJob, result: Finished, store: Store) -> str:
    """The answer to a request, as JSON. Raises Refusal "disk_full" if the images are asked for as URLs and cannot be stored."""
    if body.response_format == "url":
        media_type = OUTPUTS[body.output_format or "png"][1]
        items = [ImageItem(url=await store(content, media_type), seed=seed) for content, seed in _seeded(result)]
        return _document(body, job, result, items)
    return await asyncio.to_thread(_document_with_images, body, job, result)


def _document_with_images(body: GenerationBody, job: ImageJob, result: Finished) -> str:
    """The answer with the images in it: up to ten files of several megabytes."""
    return _document(body, job, result, [ImageItem(**_b64(content), seed=seed) for content, seed in _seeded(result)])


def _document(body: GenerationBody, job: ImageJob, result: Finished, items: list[ImageItem]) -> str:
    found = ImagesAnswer(
        created=int(time()),
        data=items,
        output_format=body.output_format or "png",
        quality=body.quality or "auto",
        size=f"{result.width}x{result.height}",
        model=job.model,
        timings={name: round(seconds, 6) for name, seconds in result.seconds.items()},
    )
    return found.model_dump_json(exclude_none=True)


async def stream(
    kind: str, body: GenerationBody, job: ImageJob, events: AsyncGenerator[JobEvent, None], metrics: Metrics
) -> AsyncIterator[str]:
    """Server-sent events of a job that has been accepted.

    kind: "image_generation" or "image_edit", the first part of the events' types. `partial_image` and `completed` follow as in
    OpenAI's API, or one `error`.
    """
    shared = {"output_format": body.output_format or "png", "quality": body.quality or "auto", "background": "opaque"}
    async with aclosing(events):
        try:
            async for event in events:
                created = {"created_at": int(time()), **shared}
                if isinstance(event, Partial):
                    size = {"size": body.size or "auto"}
                    numbers = {"partial_image_index": event.index, "image_index": event.image, "seed": job.seeds[event.image]}
                    yield await _image_event(f"{kind}.partial_image", event.content, {**numbers, **created, **size})
                elif isinstance(event, Finished):
                    metrics.drew(job, event)
                    size = {"size": f"{event.width}x{event.height}"}
                    for index, (content, seed) in enumerate(_seeded(event)):
                        numbers = {"image_index": index, "seed": seed}
                        yield await _image_event(f"{kind}.completed", content, {**numbers, **created, **size, "usage": None})
        except Exception as error:  # any: the answer has begun, so the error is a part of it
            if not isinstance(error, SanaExportError):  # an engine logs its own
                LOG.error("request %s failed", job.request_id, exc_info=error)
            found = answer(error, job.model)
            metrics.failed(found.code)
            yield _event("error", found.body)


async def _image_event(kind: str, content: bytes, fields: Mapping[str, Any]) -> str:
    """An event with an image, which may have megabytes, written in a thread."""
    return await asyncio.to_thread(lambda: _event(kind, {**_b64(content), **fields}))


def _event(kind: str, fields: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


def _seeded(result: Finished) -> Iterator[tuple[bytes, int]]:
    return zip(result.images, result.seeds, strict=True)


def _b64(content: bytes) -> dict[str, str]:
    return {"b64_json": base64.b64encode(content).decode()}
