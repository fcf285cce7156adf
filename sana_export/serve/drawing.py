"""The thread that draws: it takes what can be drawn together from the queue, decodes uploads, and hands images to be encoded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field
from time import monotonic, perf_counter
from typing import Any

from PIL import Image

from sana_export.errors import ArtifactError, Cancelled, DependencyError, UsageError
from sana_export.runtime import Request, SanaResult, SanaRuntime
from sana_export.serve.config import ServeConfig
from sana_export.serve.engine import ImageJob, Partial
from sana_export.serve.errors import Refusal, usage_refusal
from sana_export.serve.filters import ContentFilters
from sana_export.serve.images import encode_image, read_uploads
from sana_export.serve.models import ModelStore
from sana_export.serve.previews import preview_callback
from sana_export.serve.queue import FairQueue, Ticket

LOG = logging.getLogger(__name__)
#: Warns about prompts that are too long, with their last words.
PROMPT_LOG = logging.getLogger("sana_export.runtime.prompt")
#: The weight of the last batch in the average of seconds for an image.
_NEWEST = 0.2
#: How long the end of a step is waited for: when the server ends, and when a request has taken too long.
STEP_SECONDS = 10.0
#: The stages of `Timings` that are reported.
STAGES = ("text_encoder", "context", "vae_encoder", "denoise_loop", "vae_decoder")


@dataclass(frozen=True)
class EncodedImage:
    """One image file of a job."""

    image: int
    content: bytes = field(repr=False)
    height: int
    width: int
    #: Seconds by stage, as in `Finished`.
    seconds: Mapping[str, float]
    #: Images that were drawn together.
    batch: int


@dataclass(frozen=True, eq=False)
class ImageTask:
    """One image of a job, to be drawn."""

    job: ImageJob
    #: Which one.
    image: int
    #: Of its plan.
    steps: int
    size: tuple[int, int]
    #: Hands what became of it to whoever waits, from any thread: a `Partial`, then `EncodedImage` or an error.
    post: Callable[[Partial | EncodedImage | BaseException], None]


class DrawingThread:
    """Draws what is in a queue until the queue is closed."""

    def __init__(
        self, config: ServeConfig, queue: FairQueue[ImageTask], store: ModelStore, filters: ContentFilters, encoders: Executor
    ) -> None:
        self._config, self._queue, self._store, self._filters, self._encoders = config, queue, store, filters, encoders
        #: The tickets that are being drawn.
        self.running: tuple[Ticket[ImageTask], ...] = ()
        #: Seconds for an image, an average of the last batches.
        self.seconds_per_image = 1.0
        #: `monotonic()` of when the tickets that are being drawn were begun.
        self._begun = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="sana-export-draw", daemon=True)
        if not config.log_prompts:
            PROMPT_LOG.addFilter(self._shows)
        self._thread.start()

    @property
    def problem(self) -> str:
        """Why it draws nothing now; "" if it does.

        A call hangs if it has not ended a step after the time that the longest request may take: nobody waits for it any more.
        """
        if not self._thread.is_alive():
            return "the drawing thread has ended"
        took, longest = monotonic() - self._begun, self._config.queue.timeout
        if self.running and took > longest + STEP_SECONDS:
            return f"a call that draws has not returned for {took:.0f} seconds; a request may take {longest:g}"
        return ""

    def stop(self) -> bool:
        """Stop what runs at its next step, and wait for that for a while. The queue has to be closed.

        False: a call of a graph has not returned. The thread is left to itself, and does not keep the process from ending.
        """
        seconds = 0.0 if self._stopping else STEP_SECONDS
        self._stopping = True
        self._thread.join(seconds)
        if self._thread.is_alive():
            return False
        PROMPT_LOG.removeFilter(self._shows)
        return True

    def _shows(self, record: logging.LogRecord) -> bool:
        """Whether a record of `PROMPT_LOG` is logged: those of this thread are not."""
        return record.thread != self._thread.ident

    def _work(self) -> None:
        queue = self._config.queue
        while batch := self._queue.take(queue.max_batch, queue.batch_wait_ms / 1000):
            self._begun = monotonic()  # before `running`, which another thread reads with it
            self.running = tuple(ticket for ticket in batch if not ticket.left)
            if self.running:
                started = perf_counter()
                self._draw(self.running)
                mine = (perf_counter() - started) / len(self.running)
                self.seconds_per_image += _NEWEST * (mine - self.seconds_per_image)
            self.running = ()

    def _draw(self, tickets: Sequence[Ticket[ImageTask]]) -> None:
        """Draw tickets of one group and post what became of each. Raises nothing."""
        self._begun = monotonic()
        model, waited = tickets[0].payload.job.model, [self._begun - ticket.since for ticket in tickets]
        try:
            requests = [self._request(ticket.payload) for ticket in tickets]
            started = perf_counter()
            runtime = self._runtime(model)
            loading = perf_counter() - started
            outcomes = runtime.generate_many(
                requests,
                batch_size=len(tickets),
                callback_on_step_end=self._callback(tickets),
                cancelled=lambda: self._stopping or all(ticket.left for ticket in tickets),
                return_errors=True,
            )
            damaged = False
            for ticket, queued, outcome in zip(tickets, waited, outcomes, strict=True):
                if isinstance(outcome, SanaResult):
                    self._encoders.submit(self._finish, ticket, outcome, {"queue": queued, "load": loading}, len(tickets))
                else:
                    damaged |= self._failed(ticket, outcome)
            if damaged:
                self._store.discard(model)
        except (Cancelled, Refusal) as error:  # refused: the upload of an edit, which is drawn alone
            for ticket in tickets:
                ticket.payload.post(error)
        except Exception as error:  # any: the server lives on
            self._retry(tickets, error)

    def _runtime(self, model: str) -> SanaRuntime:
        """The loaded model. Raises what `ModelStore.use` raises, but ArtifactError in place of UsageError.

        A LoRA that is gone, for example, is the server's fault, not that of the client's request.
        """
        try:
            return self._store.use(model)
        except UsageError as error:
            raise ArtifactError(error.message, found=error.found, wanted=error.wanted, fix=error.fix) from error

    def _request(self, task: ImageTask) -> Request:
        """What the runtime is asked for an image, with the job's uploads. Raises Refusal if they are damaged.

        Uploads are decoded here, one job after the other in the queue's order: images that wait hold no pixels, and a key's
        large uploads cost the other keys no more than its turns.
        """
        job = task.job
        uploads = read_uploads(job.image, job.mask, self._config.limits.source_pixels)
        try:
            return Request(**job.words, **uploads, seed=job.seeds[task.image])
        except UsageError as error:
            raise usage_refusal(error) from error

    def _retry(self, tickets: Sequence[Ticket[ImageTask]], error: Exception) -> None:
        """After `error` ended a batch: the next one loads the model again. What did not fit into memory together is drawn alone."""
        for ticket in tickets[:1]:
            self._log(ticket, error)
        self._store.discard(tickets[0].payload.job.model)
        if isinstance(error, DependencyError) and len(tickets) > 1:
            for ticket in tickets:
                if not ticket.left:
                    self._draw([ticket])
            return
        for ticket in tickets:
            ticket.payload.post(error)

    def _failed(self, ticket: Ticket[ImageTask], error: Exception) -> bool:
        """One image of a batch has an error of its own. Returns whether the model has to be loaded again."""
        job = ticket.payload.job
        if isinstance(error, UsageError):
            ticket.payload.post(usage_refusal(error, {str(self._store.known[job.model].folder): job.model}))
            return False
        self._log(ticket, error)
        ticket.payload.post(error)
        return True

    def _log(self, ticket: Ticket[ImageTask], error: Exception) -> None:
        job = ticket.payload.job
        unexpected = not hasattr(error, "exit_code")
        LOG.error("request %s: the model %s failed: %s", job.request_id, job.model, error, exc_info=error if unexpected else None)

    def _callback(self, tickets: Sequence[Ticket[ImageTask]]) -> Callable[..., None] | None:
        """The callback that makes partial images. A job that asks for them is drawn alone."""
        ticket, task = tickets[0], tickets[0].payload
        job = task.job
        if not job.partial_images:
            return None

        def show(index: int, preview: Image.Image) -> None:
            try:
                self._filters.check_image(preview, str(job.words.get("prompt", "")))
                task.post(Partial(task.image, index, encode_image(preview, job.output_format, job.quality)))
            except Exception as error:  # any: a filter refuses it, or fails
                task.post(error)
                ticket.left = True

        return preview_callback(task.steps, job.partial_images, self._config.preview, task.size, show)

    def _finish(self, ticket: Ticket[ImageTask], result: SanaResult, seconds: dict[str, float], batch: int) -> None:
        """Check and encode an image, in a thread of `encoders`."""
        task = ticket.payload
        job = task.job
        if ticket.left:
            return
        try:
            self._filters.check_image(result.images[0], str(job.words.get("prompt", "")))
            started = perf_counter()
            metadata = result.metadata[0] if self._config.image_metadata else None
            content = encode_image(result.images[0], job.output_format, job.quality, metadata)
        except Exception as error:  # any: of a filter, or of Pillow
            task.post(error)
            return
        stages: dict[str, Any] = asdict(result.timings)
        seconds |= {name: stages[name] for name in STAGES} | {"encode": perf_counter() - started}
        task.post(EncodedImage(task.image, content, result.height, result.width, seconds, batch))
