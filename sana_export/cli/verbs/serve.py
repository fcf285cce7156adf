"""`sana-export serve`: an image server over a bundle."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.verb import (
    Answer,
    Verb,
    add_bundle_to_read,
    add_device,
    add_hub_options,
    hub_options,
    path_named,
    positive,
    whole,
)
from sana_export.errors import UsageError
from sana_export.numeric import MAX_IMAGES
from sana_export.runtime.backends import BACKENDS
from sana_export.runtime.memory import AUTO

if TYPE_CHECKING:
    from sana_export.serve.config import ModelConfig, ServeConfig

#: Names of models in requests.
_NAME = re.compile(r"[\w.-]{1,100}")
#: Every time in seconds or milliseconds is below this, 11 days, which the clocks of all systems take.
_LONGEST = 1e6
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_to_read(parser)
    models: Any = parser.add_argument_group("models")
    models.add_argument("--name", metavar="NAME", help="name of BUNDLE in requests (default: the last part of its own name)")
    models.add_argument(
        "--model",
        metavar="NAME=BUNDLE",
        action="append",
        default=[],
        help="another bundle under a name; can be given several times",
    )
    models.add_argument(
        "--lora",
        metavar="NAME=PATH[:SCALE]",
        action="append",
        default=[],
        help="BUNDLE with a LoRA, as a model of its own; the same NAME again adds another LoRA to it",
    )
    models.add_argument(
        "--backend", metavar="B", default=AUTO, help=f"auto, {', '.join(BACKENDS)} (default: auto, the best one that runs here)"
    )
    models.add_argument(
        "--memory", metavar="MODE", default=AUTO, help="resident, staged or streaming, as in generate (default: auto)"
    )
    models.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=size_in_bytes,
        help="weights that may be loaded at a time, such as 20G; models that were not used for the longest are closed",
    )
    add_device(parser)
    _add_network(parser)
    _add_queue(parser)
    _add_limits(parser)
    add_hub_options(parser)


def _add_network(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group("network and keys")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; others than loopback need keys (default: 127.0.0.1)"
    )
    group.add_argument("--port", type=whole(0, 65535), default=8000, metavar="N", help="0: any free one (default: 8000)")
    group.add_argument(
        "--api-keys",
        metavar="FILE",
        type=path_named("--api-keys"),
        help="a file with a line id:key for each API key (default: those in the environment variable SANA_EXPORT_API_KEYS)",
    )
    group.add_argument("--allow-without-keys", action="store_true", help="listen on other addresses than loopback without keys")
    group.add_argument(
        "--public-url",
        metavar="URL",
        type=public_url,
        help="what the URLs of images begin with, and a name of the server (default: the host of the request)",
    )
    group.add_argument("--log-prompts", action="store_true", help="write prompts to the log")


def _add_queue(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group("queue")
    group.add_argument("--queue", type=positive, metavar="N", help="images that may wait; the next request gets 429 (default: 64)")
    group.add_argument(
        "--batch", type=whole(1, MAX_IMAGES), metavar="N", help="images that are drawn together; 1: none (default: 4)"
    )
    group.add_argument(
        "--batch-wait", type=number(0), metavar="MS", help="milliseconds that an incomplete batch waits for others (default: 0)"
    )
    group.add_argument("--timeout", type=number(0.1), metavar="S", help="seconds until a request gets 504 (default: 120)")
    group.add_argument(
        "--shutdown-timeout", type=number(0.1), metavar="S", help="seconds that running requests have after SIGTERM (default: 120)"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group: Any = parser.add_argument_group("limits and content")
    group.add_argument("--max-prompt", type=positive, metavar="N", help="characters of a prompt (default: 4000)")
    group.add_argument("--max-pixels", type=positive, metavar="N", help="pixels of an image (default: 4194304, 2048x2048)")
    group.add_argument("--max-images", type=whole(1, 10), metavar="N", help="images of a request (default: 10)")
    group.add_argument("--max-steps", type=positive, metavar="N", help="sampling steps (default: 100)")
    group.add_argument("--max-body", type=size_in_bytes, metavar="SIZE", help="bytes of a request with images (default: 32M)")
    group.add_argument("--max-connections", type=positive, metavar="N", help="open connections (default: 512)")
    group.add_argument(
        "--content-filter",
        metavar="MODULE:NAME",
        action="append",
        default=[],
        help="Python code that may refuse prompts and images; can be given several times",
    )
    group.add_argument(
        "--preview",
        choices=("linear", "decoder"),
        default="linear",
        help="how partial images are made (default: linear, which is fast)",
    )
    group.add_argument("--image-metadata", action="store_true", help="write the prompt and parameters into the image files")
    group.add_argument(
        "--url-dir",
        metavar="DIR",
        type=path_named("--url-dir"),
        help="folder of images that are asked for as URLs (default: temporary)",
    )
    group.add_argument("--url-seconds", type=positive, metavar="S", help="after which these images are deleted (default: 3600)")


#: Options of the fields of a `QueueConfig` and a `RequestLimits`. Those that are not given have the defaults there.
QUEUE = {"queue": "places", "batch": "max_batch", "batch_wait": "batch_wait_ms", "timeout": "timeout"}
LIMITS = {
    "max_prompt": "prompt_characters",
    "max_pixels": "pixels",
    "max_images": "images",
    "max_steps": "steps",
    "max_body": "body_bytes",
    "max_connections": "connections",
}


def run(options: argparse.Namespace, console: Console) -> Answer:
    require("", "serve")
    from sana_export.serve.run import serve

    config = serve_config(options)
    serve(config, started=lambda address: console.line(f"{address} serves {', '.join(model.name for model in config.models)}"))
    return Answer({"models": [model.name for model in config.models]}, "stopped")


def serve_config(options: argparse.Namespace) -> ServeConfig:
    """The configuration that the options are. Raises UsageError."""
    from sana_export.serve.config import QueueConfig, RequestLimits, ServeConfig
    from sana_export.serve.keys import read_keys

    given = {name: value for name, value in vars(options).items() if value is not None}
    others = {"shutdown_timeout": "shutdown_seconds", "url_dir": "url_folder", "url_seconds": "url_seconds"}
    return ServeConfig(
        models=model_configs(options),
        host=options.host,
        port=options.port,
        limits=RequestLimits(**{field: given[option] for option, field in LIMITS.items() if option in given}),
        queue=QueueConfig(**{field: given[option] for option, field in QUEUE.items() if option in given}),
        keys=read_keys(options.api_keys),
        allow_without_keys=options.allow_without_keys,
        memory_budget=options.memory_budget,
        content_filters=tuple(options.content_filter),
        public_url=options.public_url,
        preview=options.preview,
        image_metadata=options.image_metadata,
        log_prompts=options.log_prompts,
        hub=hub_options(options),
        **{field: given[option] for option, field in others.items() if option in given},
    )


def model_configs(options: argparse.Namespace) -> tuple[ModelConfig, ...]:
    """BUNDLE, the bundles of --model, and BUNDLE with the LoRAs of --lora.

    Raises UsageError for a name with other characters, and for one that two bundles, or a bundle and a LoRA, have.
    """
    from sana_export.adapters import parse_lora
    from sana_export.serve.config import ModelConfig

    default = re.sub(r"[^\w.-]", "-", Path(options.bundle.partition("@")[0]).absolute().name)[:100] or "model"
    name = default if options.name is None else _checked("--name", options.name, options.name)
    first = ModelConfig(
        name, options.bundle, backend=options.backend, memory=options.memory, device=options.device, threads=options.threads
    )
    bundles, with_loras = {name: first}, dict[str, ModelConfig]()
    for text in options.model:
        other, bundle = _named("--model", text, bundles)
        bundles[other] = replace(first, name=other, bundle=bundle)
    for text in options.lora:
        other, lora = _named("--lora", text, bundles)
        before = with_loras.get(other, replace(first, name=other))
        with_loras[other] = replace(before, loras=(*before.loras, parse_lora(lora)))
    return (*bundles.values(), *with_loras.values())


def _named(option: str, text: str, taken: Collection[str]) -> tuple[str, str]:
    """The two parts of NAME=VALUE. Raises UsageError if a part is missing or the name is taken."""
    name, _, value = text.partition("=")
    if not value:
        raise UsageError(f"{option} has no name", found=text, wanted=f"{option} NAME=...")
    if _checked(option, name, text) in taken:
        raise UsageError(
            f"two models have the name {name}",
            found=f"{option} {text}",
            wanted="a name of its own",
            fix=f"{option} {name}-2={value}",
        )
    return name, value


def _checked(option: str, name: str, text: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{option} has a name that requests cannot use", found=repr(text), wanted="1 to 100 letters, digits, _ . -"
        )
    return name


def number(least: float) -> Callable[[str], float]:
    """A type for argparse: a number from `least` to `_LONGEST`."""

    def parse(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not least <= found <= _LONGEST:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least:g} to {_LONGEST:.0f}")
        return found

    return parse


def public_url(text: str) -> str:
    """A URL that others begin with, for argparse."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
    except ValueError:
        usable = False
    if not usable:
        raise argparse.ArgumentTypeError(f"{text!r} is not a URL such as https://images.example")
    return text


def size_in_bytes(text: str) -> int:
    """A number of bytes such as 20G, 512M or 1000, for argparse."""
    match = re.fullmatch(r"(\d{1,15})([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 20G or 512M")
    return int(match[1]) * _UNITS[match[2].upper()]


VERB = Verb(
    name="serve",
    summary="serve a bundle over HTTP, as OpenAI's images API",
    description="Serves images over HTTP in the shape of OpenAI's API, on this machine unless told otherwise. docs/serving.md "
    "describes the API. Ctrl-C or SIGTERM ends it when the running requests have finished.",
    example="sana-export serve bundle --port 8000\n"
    "  sana-export serve bundle --lora anime=anime.safetensors:0.8 --model large=other-bundle --memory-budget 20G",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
