"""What the HTTP server needs of whatever draws: the seam between `app.py` and one process (`worker.py`) or many (Ray).

Jobs and events are frozen and can be pickled.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ImageJob:
    """One checked HTTP request, for a model."""

    #: The name of a model.
    model: str
    #: Parameters of `Request`: prompt, height, width, num_inference_steps, guidance_scale, ... Those that are not there have the
    #: checkpoint's defaults. No images, no seed.
    words: Mapping[str, Any]
    #: One for each image: it draws what `SanaRuntime` draws with this seed alone.
    seeds: tuple[int, ...]
    #: Seconds from now until the job fails with the code "timeout".
    timeout: float
    #: The id of the API key; "" without keys. Keys take turns.
    key: str = ""
    #: The id of the HTTP request, for logs.
    request_id: str = ""
    #: The image to start from and its mask: the bytes of image files, as the client sent them.
    image: bytes | None = field(default=None, repr=False)
    mask: bytes | None = field(default=None, repr=False)
    #: How many previews of each image are sent while it is drawn, 0 to 3.
    partial_images: int = 0
    #: A word of `image_files.FORMATS`: "png", "jpg" or "webp".
    output_format: str = "png"
    #: 1 to 100 for jpg and webp. None: 95 for jpg, lossless for webp.
    quality: int | None = None


@dataclass(frozen=True)
class Accepted:
    """The job has a place in the queue. Always the first event."""

    #: Jobs that are before it, roughly.
    ahead: int


@dataclass(frozen=True)
class Partial:
    """A preview of one image."""

    #: Which image of the job.
    image: int
    #: 0, 1, 2: which preview of this image.
    index: int
    #: An image file of the job's format, of the size of the final image.
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class Finished:
    """All images of the job. Always the last event."""

    #: Image files of the job's format, in the order of the seeds.
    images: tuple[bytes, ...] = field(repr=False)
    seeds: tuple[int, ...]
    height: int
    width: int
    #: Seconds by stage: "queue", "load", the names of `Timings` (text_encoder, context, denoise_loop, vae_decoder, vae_encoder),
    #: and "encode" for the image files.
    seconds: Mapping[str, float]
    #: Images that were drawn together with these, themselves included.
    batch: int = 1


#: What a job yields.
JobEvent = Accepted | Partial | Finished


@dataclass(frozen=True)
class ModelCard:
    """A model as clients see it."""

    name: str
    #: When it was made known, in seconds since 1970.
    created: int
    #: Whether its graphs can start from an image.
    edits: bool
    #: The height and width of images of requests that name no size.
    native_size: int
    loaded: bool = False


@dataclass(frozen=True)
class EngineStatus:
    """What health checks and metrics show."""

    #: Whether new jobs are accepted and drawn.
    ready: bool
    #: Why not; "" if they are.
    reason: str = ""
    #: Jobs that wait, and jobs that are being drawn.
    waiting: int = 0
    running: int = 0
    #: Jobs that can wait.
    places: int = 0
    #: Bytes of GPU memory by GPU: (used, total).
    gpu_memory: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Engine(Protocol):
    """Draws jobs. All methods are called from one asyncio event loop."""

    def models(self) -> tuple[ModelCard, ...]:
        """The models, the default one first. The same names for the whole life of the engine."""
        ...

    def submit(self, job: ImageJob) -> AsyncGenerator[JobEvent, None]:
        """Yield `Accepted`, any number of `Partial`, and `Finished`.

        Close it (`aclose`), or cancel the task that waits for it, and the job loses its place in the queue; if it is being drawn,
        sampling stops at the next step.

        Raises Refusal (errors.py): "queue_full", "shutting_down", "timeout", "model_not_found", "content_policy_violation";
        UsageError for a request that the model cannot meet; ArtifactError, DependencyError, and any other error of the engine.
        """
        ...

    def status(self) -> EngineStatus:
        """The state now. Must return at once."""
        ...


class EndingEngine(Engine, Protocol):
    """An engine that its server ends. Ray ends its replicas itself."""

    async def drain(self) -> None:
        """Refuse new jobs and those that wait ("shutting_down"), and return when the running ones have finished."""
        ...

    def close(self) -> None:
        """Stop what runs and release everything."""
        ...
