"""What `build` takes: the arguments of `serve run`, or `args` of an application in a Serve config file.

Values of a command line are strings; they are converted. Unknown names are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass as checked

from sana_export.adapters import Lora
from sana_export.errors import UsageError
from sana_export.runtime.memory import AUTO
from sana_export.serve.config import ModelConfig, QueueConfig, RequestLimits, ServeConfig
from sana_export.serve.keys import read_keys

STRICT = ConfigDict(extra="forbid", frozen=True)
#: How much longer than a request Ray waits for what has to end by itself: a replica that drains, a health check.
SPARE_SECONDS = 30.0


@checked(config=ConfigDict(extra="forbid"), frozen=True)
class RayLimits(RequestLimits):
    """The fields of `RequestLimits`, converted and checked."""


class RayLora(BaseModel):
    """A LoRA of a model."""

    model_config = STRICT
    #: The file, or its folder, on every machine with a drawing replica.
    path: Path
    scale: float = 1.0


class RayModel(BaseModel):
    """A model, with the fields of `ModelConfig`."""

    model_config = STRICT
    name: str
    #: A folder that is on every machine with a drawing replica, or a repository of the hub.
    bundle: str
    loras: tuple[RayLora, ...] = ()
    backend: str = AUTO
    memory: str = AUTO
    threads: PositiveInt | None = None
    backend_options: Mapping[str, Any] = Field(default_factory=dict)
    memory_bytes: PositiveInt | None = None


class RayConfig(BaseModel):
    """The whole application."""

    model_config = STRICT
    #: One model, named after the last part of this folder or repository. For more of them, or for LoRAs: `models`.
    bundle: str | None = None
    #: The first one is the default of requests that name none. Every drawing replica can draw all of them.
    models: tuple[RayModel, ...] = ()
    #: CPU threads, backend and memory mode of `bundle`.
    threads: PositiveInt | None = None
    backend: str = AUTO
    memory: str = AUTO
    #: Bytes that the loaded models of one replica may take together. None: none is closed.
    memory_budget: PositiveInt | None = None

    #: Drawing replicas, if `max_replicas` is not given.
    replicas: PositiveInt = 1
    #: With `max_replicas`, Ray starts and stops replicas between these two by the requests that wait or run.
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt | None = None
    #: The requests that wait or run, for each replica, that autoscaling aims at.
    target_requests: PositiveFloat = 4.0
    #: Seconds for which the load has to be higher, or lower, before replicas are started or stopped.
    upscale_seconds: NonNegativeFloat = 10.0
    downscale_seconds: NonNegativeFloat = 300.0
    #: What Ray reserves for each drawing replica. 0 GPUs: draw on the CPU.
    gpus_per_replica: NonNegativeFloat = 1.0
    cpus_per_replica: NonNegativeFloat = 1.0

    #: Requests that a drawing replica holds: those that it draws, and those that it can join to the next batch.
    max_ongoing_requests: PositiveInt = 8
    #: Requests that wait for a replica in each front replica. The next one gets 429.
    max_queued_requests: PositiveInt = 64
    #: Images that are drawn together, and how long a batch that is not full waits, as in `QueueConfig`.
    max_batch: PositiveInt = 4
    batch_wait_ms: NonNegativeFloat = 0.0
    #: Seconds from a request's arrival until it gets 504.
    timeout: PositiveFloat = 120.0

    #: Seconds between Ray's health checks of a replica.
    health_check_period: PositiveFloat = 10.0
    #: A replica that finished no image for this many seconds draws one at its next health check.
    health_image_period: NonNegativeFloat = 60.0
    #: Seconds that this image may take, with what is drawn before it. None: `timeout`.
    health_timeout: PositiveFloat | None = None
    #: The side of this image in pixels. None: the model's native size, which every engine takes.
    health_size: PositiveInt | None = None
    #: Seconds that a replica which is replaced or removed has to finish its requests. None: `timeout` and 30 more.
    shutdown_seconds: PositiveFloat | None = None

    #: Replicas of the front, which checks requests and hands them on. They need no GPU and no bundle.
    front_replicas: PositiveInt = 2
    cpus_per_front: NonNegativeFloat = 1.0
    #: A file of API keys on every machine with a front replica.
    keys_file: Path | None = None
    #: Whether the application may run without keys. Serve's proxies decide who can reach it.
    allow_without_keys: bool = False
    limits: RayLimits = Field(default_factory=RayLimits)
    content_filters: tuple[str, ...] = ()
    preview: str = "linear"
    image_metadata: bool = False
    log_prompts: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.bundle is None) == (not self.models):
            raise ValueError("one of bundle and models is needed: bundle=FOLDER, or models with a name and a bundle each")
        if self.max_replicas is not None:
            if self.max_replicas < max(1, self.min_replicas):
                raise ValueError(f"max_replicas is {self.max_replicas}: it must be at least min_replicas, {self.min_replicas}")
            if self.target_requests > (most := self.max_ongoing_requests):
                raise ValueError(f"target_requests is {self.target_requests:g}: replicas have at most max_ongoing_requests, {most}")
        if self.keys_file is None and not self.allow_without_keys:
            raise ValueError("keys_file is missing: name a file of API keys, or set allow_without_keys=true")
        return self

    @property
    def least_replicas(self) -> int:
        """The drawing replicas that Ray always keeps running."""
        return self.replicas if self.max_replicas is None else self.min_replicas

    @property
    def longest_health_check(self) -> float:
        """Seconds that the image of a health check may take."""
        return self.timeout if self.health_timeout is None else self.health_timeout

    @property
    def longest_shutdown(self) -> float:
        """Seconds that a replica has to finish its requests."""
        return self.timeout + SPARE_SECONDS if self.shutdown_seconds is None else self.shutdown_seconds

    def keys(self) -> dict[str, str]:
        """The API keys by id, of this machine's file. Raises UsageError for more than can wait, and what `read_keys` raises."""
        keys = {} if self.keys_file is None else read_keys(self.keys_file)
        if len(keys) > self.max_queued_requests:
            raise UsageError(
                "the queue has no room for one request of each API key",
                found=f"max_queued_requests {self.max_queued_requests}, and {len(keys)} keys in {self.keys_file}",
                wanted=f"at least {len(keys)}",
                fix=f"max_queued_requests={len(keys)}",
            )
        return keys

    def in_replica(self) -> ServeConfig:
        """What the engine inside a drawing replica is told."""
        images = self.max_ongoing_requests * self.limits.images + 1  # and the health check
        return self._serve_config(places=images, keys={})

    def in_front(self, keys: Mapping[str, str]) -> ServeConfig:
        """What the HTTP application in a front replica is told. `keys`: the API keys by id."""
        return self._serve_config(places=self.max_queued_requests, keys=keys)

    def _serve_config(self, places: int, keys: Mapping[str, str]) -> ServeConfig:
        return ServeConfig(
            models=self._models(),
            host="0.0.0.0",  # Serve's proxies listen, and decide where
            limits=self.limits,
            queue=QueueConfig(places, self.max_batch, self.batch_wait_ms, self.timeout),
            keys=keys,
            allow_without_keys=self.allow_without_keys,
            memory_budget=self.memory_budget,
            content_filters=self.content_filters,
            url_bytes=0,  # another front replica could not find the file
            preview=self.preview,
            image_metadata=self.image_metadata,
            log_prompts=self.log_prompts,
            shutdown_seconds=self.longest_shutdown,
        )

    def _models(self) -> tuple[ModelConfig, ...]:
        if self.bundle is not None:
            name = Path(self.bundle).name
            return (ModelConfig(name, self.bundle, backend=self.backend, memory=self.memory, threads=self.threads),)
        return tuple(
            ModelConfig(**{**dict(model), "loras": tuple(Lora(lora.path, lora.scale) for lora in model.loras)})
            for model in self.models
        )
