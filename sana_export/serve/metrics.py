"""Metrics for Prometheus."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from sana_export.serve.engine import Engine, Finished, ImageJob

LOG = logging.getLogger(__name__)
#: Seconds; images take from a tenth of a second on a large GPU to minutes on a CPU.
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
#: Gauges of the fields of `EngineStatus`.
_STATE = {
    "waiting": "Images that wait in the queue",
    "running": "Images that are being drawn",
    "places": "Places in the queue",
    "ready": "1 if requests are accepted",
}
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        count, gauge = partial(Counter, registry=self._registry), partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self._answers = count("sana_requests", "HTTP requests, by route, status and key id", ["route", "status", "key"])
        self._errors = count("sana_errors", "Errors of requests, by the code in their body", ["code"])
        self._images = count("sana_images", "Images that were drawn", ["model"])
        self._stages = histogram("sana_stage_seconds", "Seconds of a request by stage", ["model", "stage"], buckets=_BUCKETS)
        self._batch = histogram("sana_batch_images", "Images that were drawn together", buckets=(1, 2, 4, 8, 16, 32))
        self._state = {name: gauge(f"sana_queue_{name}", text) for name, text in _STATE.items()}
        self._loaded = gauge("sana_model_loaded", "1 if a model is in memory", ["model"])
        self._gpu = gauge("sana_gpu_memory_bytes", "Memory of a GPU", ["gpu", "kind"])

    def answered(self, route: str, status: int, key: str) -> None:
        """Count an HTTP request."""
        self._answers.labels(route, status, key).inc()

    def failed(self, code: str) -> None:
        """Count an error."""
        self._errors.labels(code).inc()

    def drew(self, job: ImageJob, result: Finished) -> None:
        """Count the images of a job, and the time that each stage took."""
        self._images.labels(job.model).inc(len(result.images))
        self._batch.observe(result.batch)
        for stage, seconds in result.seconds.items():
            self._stages.labels(job.model, stage).observe(seconds)

    def text(self) -> bytes:
        """All of them, for Prometheus."""
        status = self._engine.status()
        for name, value in self._state.items():
            value.set(float(getattr(status, name)))
        for card in self._engine.models():
            self._loaded.labels(card.name).set(card.loaded)
        for gpu, (used, total) in (status.gpu_memory or gpu_memory()).items():
            self._gpu.labels(gpu, "used").set(used)
            self._gpu.labels(gpu, "total").set(total)
        return generate_latest(self._registry)


def gpu_memory() -> dict[str, tuple[int, int]]:
    """(used, total) bytes of each GPU by index, from nvidia-ml-py. Empty without it or without a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # ImportError, or any of the driver's
        LOG.debug("no GPU memory in the metrics: %s", error)
        return {}
    try:
        found: dict[str, tuple[int, int]] = {}
        for index in range(pynvml.nvmlDeviceGetCount()):
            memory: Any = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index))
            found[str(index)] = (memory.used, memory.total)
        return found
    finally:
        pynvml.nvmlShutdown()
