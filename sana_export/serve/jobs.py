"""From the body of a request to a job: defaults, and the limits of the server."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from sana_export.serve.config import ServeConfig
from sana_export.serve.engine import ImageJob, ModelCard
from sana_export.serve.errors import Refusal
from sana_export.serve.images import OUTPUTS
from sana_export.serve.schema import MOST_SEED, GenerationBody
from sana_export.serve.security import Caller

#: Fields that are parameters of the runtime's `Request`.
WORDS = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "pag_scale", "scheduler", "strength")


def image_job(
    body: GenerationBody,
    models: Sequence[ModelCard],
    config: ServeConfig,
    caller: Caller,
    *,
    timeout: float,
    image: bytes | None = None,
    mask: bytes | None = None,
) -> ImageJob:
    """The job of a body. Raises Refusal for what the server does not allow."""
    card = _model(body, models)
    _check_limits(body, config)
    _check_combinations(body)
    count = body.n or 1
    words = {name: value for name in WORDS if (value := getattr(body, name, None)) is not None}
    seed = _first_seed(body.seed, count)
    return ImageJob(
        model=card.name,
        words=words | _size(body.size, config),
        seeds=tuple(range(seed, seed + count)),
        timeout=timeout,
        key=caller.key,
        request_id=caller.request_id,
        image=image,
        mask=mask,
        partial_images=body.partial_images or 0,
        output_format=OUTPUTS[body.output_format or "png"][0],
        quality=None if body.output_compression is None else max(body.output_compression, 1),
    )


def _model(body: GenerationBody, models: Sequence[ModelCard]) -> ModelCard:
    for card in models:
        if body.model in (None, card.name):
            return card
    raise Refusal("model_not_found", f"the model {body.model!r} does not exist; /v1/models lists the models", param="model")


def _check_limits(body: GenerationBody, config: ServeConfig) -> None:
    limits = config.limits
    longest = limits.prompt_characters
    for name, value, most, unit in (
        ("prompt", len(body.prompt), longest, "characters"),
        ("negative_prompt", len(body.negative_prompt or ""), longest, "characters"),
        ("n", body.n or 1, limits.images, "images"),
        ("num_inference_steps", body.num_inference_steps or 1, limits.steps, "steps"),
    ):
        if value > most:
            raise Refusal("invalid_value", f"{name} is too large: {value} {unit}; at most {most} are allowed", param=name)
    if body.response_format == "url" and not config.url_bytes:
        raise Refusal("invalid_value", "this server keeps no image files: ask for b64_json", param="response_format")


def _check_combinations(body: GenerationBody) -> None:
    """Raise Refusal for fields that have no meaning together."""
    if body.partial_images and not body.stream:
        raise Refusal("invalid_value", "partial_images has no meaning without stream: true", param="partial_images")
    if body.stream and body.response_format == "url":
        raise Refusal("invalid_value", "a stream has its images as b64_json, not as url", param="response_format")
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise Refusal("invalid_value", "output_compression is for jpeg and webp", param="output_compression")


def _size(size: str | None, config: ServeConfig) -> dict[str, Any]:
    if size in (None, "auto"):
        return {}
    width, height = map(int, str(size).split("x"))
    most = config.limits.pixels
    if width * height > most:
        raise Refusal("invalid_value", f"size is too large: {width * height} pixels; at most {most} are allowed", param="size")
    return {"height": height, "width": width}


def _first_seed(asked: int | None, count: int) -> int:
    """The seed of the first of `count` images. Raises Refusal if the last one would have a seed that is too large."""
    if asked is None:
        return secrets.randbelow(2**32)
    if asked + count - 1 > MOST_SEED:
        message = f"seed is too large: {count} images have the seeds up to {asked + count - 1}; at most {MOST_SEED} is allowed"
        raise Refusal("invalid_value", message, param="seed")
    return asked


def asked_timeout(header: str | None, config: ServeConfig) -> float:
    """The seconds that a request may take: those of its header X-Request-Timeout, up to the server's. Raises Refusal."""
    if header is None:
        return config.queue.timeout
    try:
        seconds = float(header)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise Refusal("invalid_value", "the header X-Request-Timeout is not a number of seconds above 0")
    return min(seconds, config.queue.timeout)
