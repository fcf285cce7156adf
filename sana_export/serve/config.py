"""What a server is told: its models, its limits, its queue and its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_export.adapters import Lora
from sana_export.hub.client import Hub
from sana_export.runtime.memory import AUTO


@dataclass(frozen=True)
class ModelConfig:
    """A model that requests can name: a bundle, with LoRAs or without."""

    #: What a request writes as `model`.
    name: str
    #: A folder, or a repository of the hub.
    bundle: str | Path
    #: Added to the bundle's weights, in this order. Models over one bundle share its runtime, whose LoRAs are changed as needed.
    loras: tuple[Lora, ...] = ()
    #: As in `SanaRuntime.from_pretrained`.
    backend: str = AUTO
    memory: str = AUTO
    device: int | None = None
    threads: int | None = None
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    #: Bytes that the loaded bundle counts in the memory budget. None: those of its weights.
    memory_bytes: int | None = None


@dataclass(frozen=True)
class RequestLimits:
    """What one request, one client and all connections may ask for."""

    #: Characters of the prompt, and of the negative prompt.
    prompt_characters: int = 4000
    #: Pixels of one image, height * width.
    pixels: int = 2048 * 2048
    #: Images of one request, up to 10 as in OpenAI's API.
    images: int = 10
    #: Sampling steps.
    steps: int = 100
    #: Bytes of a JSON body.
    json_bytes: int = 256 * 1024
    #: Bytes of a body with images.
    body_bytes: int = 32 * 1024 * 1024
    #: Bytes of all bodies that are held at a time.
    held_bytes: int = 512 * 1024 * 1024
    #: Pixels of an image that a client sends, checked before it is decoded.
    source_pixels: int = 2**24
    #: Bytes of a request line with its headers.
    head_bytes: int = 32 * 1024
    #: Open connections.
    connections: int = 512
    #: Seconds in which a client has to send the head, then the body, and to read a part of the answer.
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    read_seconds: float = 60.0
    #: Bytes of an answer that a client has to read in each second, if it does not keep up.
    read_rate: int = 16 * 1024


@dataclass(frozen=True)
class QueueConfig:
    """How requests wait and which are drawn together."""

    #: Images that wait. The next one gets 429. At least the images of one request and one for each other API key.
    places: int = 64
    #: Images that are drawn together. 1: each image is exactly what a call of its own gives, on every backend.
    max_batch: int = 4
    #: How long a batch that is not full waits for more requests.
    batch_wait_ms: float = 0.0
    #: Seconds from a request's arrival until it gets 504, unless it asks for less.
    timeout: float = 120.0


@dataclass(frozen=True)
class ServeConfig:
    """A whole server."""

    #: The first one is the default of requests that name none.
    models: tuple[ModelConfig, ...]
    host: str = "127.0.0.1"
    #: 0: any free one.
    port: int = 8000
    limits: RequestLimits = field(default_factory=RequestLimits)
    queue: QueueConfig = field(default_factory=QueueConfig)
    #: The API keys by id. Requests are counted and logged by id. Empty: no key is needed.
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    #: Whether a server without keys may listen on other addresses than loopback.
    allow_without_keys: bool = False
    #: Bytes that loaded bundles may take together. None: none is closed.
    memory_budget: int | None = None
    #: Content filters as "module:function", besides those of installed packages (filters.py).
    content_filters: tuple[str, ...] = ()
    #: The folder of images that are answered as a URL. None: a temporary one.
    url_folder: Path | None = None
    #: Seconds until such an image is deleted.
    url_seconds: float = 3600.0
    #: Bytes that these images may take together. 0: images are never answered as a URL.
    url_bytes: int = 2**30
    #: The address of the server that URLs begin with. None: the one that the client used.
    public_url: str | None = None
    #: How partial images are made, as in `SanaRuntime.preview`: "linear" or "decoder".
    preview: str = "linear"
    #: Whether image files say how they were drawn, with the prompt.
    image_metadata: bool = False
    #: Whether prompts are logged.
    log_prompts: bool = False
    #: How models on the hub are fetched.
    hub: Hub = field(default_factory=Hub)
    #: Seconds that running requests have to finish after SIGTERM.
    shutdown_seconds: float = 120.0
