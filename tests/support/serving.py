"""Stand-ins for what a server draws with, and servers that run in a thread of the test."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from sana_export.errors import Cancelled
from sana_export.runtime.results import SanaResult, Timings
from sana_export.serve.app import create_app
from sana_export.serve.config import ModelConfig, ServeConfig
from sana_export.serve.engine import Accepted, Engine, EngineStatus, Finished, ImageJob, JobEvent, ModelCard, Partial
from sana_export.serve.run import server_settings

TIMINGS = Timings(0.1, 0.2, (0.3,), 0.3, 0.4, 1.0)


def color(seed: int) -> tuple[int, int, int]:
    """The color of the image of a seed."""
    return seed % 256, seed // 256 % 256, 77


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, color(seed))


def image_file(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pixel(content: bytes) -> Any:
    """The first pixel of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB").getpixel((0, 0))


class StandInEngine:
    """An engine of one model that answers at once with images of the seeds' colors, or raises `error`, or waits for ever."""

    def __init__(self) -> None:
        self.jobs: list[ImageJob] = []
        #: Raised before, and after, a job is accepted.
        self.refusal: Exception | None = None
        self.error: Exception | None = None
        self.endless = self.draining = False
        #: Jobs whose client went away.
        self.left: list[str] = []

    def models(self) -> tuple[ModelCard, ...]:
        return (ModelCard("first", 1, edits=True, native_size=8), ModelCard("second", 2, edits=False, native_size=8))

    def status(self) -> EngineStatus:
        return EngineStatus(not self.draining, "shutting down" if self.draining else "", 3, 2, 64)

    async def submit(self, job: ImageJob) -> AsyncGenerator[JobEvent, None]:
        self.jobs.append(job)
        if self.refusal is not None:
            raise self.refusal
        try:
            yield Accepted(0)
            while self.endless:
                await asyncio.sleep(0.01)
            if self.error is not None:
                raise self.error
            for index in range(job.partial_images):
                yield Partial(0, index, image_file(picture(1000 + index)))
            await asyncio.sleep(0)
            images = tuple(image_file(picture(seed)) for seed in job.seeds)
            yield Finished(images, job.seeds, 8, 8, {"queue": 0.5, "denoise_loop": 1.5}, 2)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(job.request_id)
            raise

    async def drain(self) -> None:
        self.draining = True

    def close(self) -> None:
        pass


class StandInRuntime:
    """A runtime whose images have the seeds' colors. It takes a step whenever `gate` is open, and records what it is asked."""

    steps = 3

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.name, self.bundle = config.name, folder
        self.batches: list[list[int]] = []
        self.loras: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        #: Raised for a batch if it returns an error for its seeds.
        self.fails: Callable[[list[int]], Exception | None] = lambda seeds: None
        self.steps_taken, self.closed = 0, False

    def generate_many(self, requests: Sequence[Any], *, batch_size: int, cancelled: Callable[[], bool], **_: Any) -> Iterator[Any]:
        seeds = [request.seed for request in requests]
        self.batches.append(seeds)
        if (error := self.fails(seeds)) is not None:
            raise error
        for _step in range(self.steps):
            while not self.gate.wait(0.01):
                if cancelled():
                    raise Cancelled("the call was cancelled")
            if cancelled():
                raise Cancelled("the call was cancelled")
            self.steps_taken += 1
        for seed in seeds:
            yield SanaResult([picture(seed)], (seed,), 8, 8, (0, 1), (0, 1), TIMINGS, {}, ({"request": {}},))

    def load_lora(self, path: Path, scale: float) -> None:
        self.loras.append(f"{path.name}:{scale:g}")

    def unload_lora(self) -> None:
        self.loras.clear()

    def close(self) -> None:
        self.closed = True


@contextmanager
def running(engine: Engine, config: ServeConfig) -> Iterator[str]:
    """The address of a server over `engine`, in a thread."""
    server = uvicorn.Server(server_settings(create_app(engine, config), config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(2)
        server.force_exit = True
        thread.join(10)


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until `condition` holds. Fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)
