"""`sana-export demo`: a page that draws with a bundle, in a browser."""

from __future__ import annotations

import argparse
import contextlib
import threading

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import (
    Answer,
    Verb,
    add_bundle_to_read,
    add_device,
    add_hub_options,
    bundle_to_read,
    whole,
)
from sana_export.runtime.backends import BACKENDS
from sana_export.runtime.memory import AUTO
from sana_export.serve.demo.settings import LOOPBACK, PORT, DemoSettings

_LARGEST_PORT = 65535


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_to_read(parser)
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default=LOOPBACK,
        help=f"the address to listen on (default: {LOOPBACK}, this machine only; 0.0.0.0: everyone who reaches this machine)",
    )
    parser.add_argument(
        "--port", type=whole(0, _LARGEST_PORT), metavar="N", default=PORT, help=f"the port (default: {PORT}; 0: any free one)"
    )
    parser.add_argument(
        "--lora",
        metavar="PATH[:SCALE]",
        action="append",
        default=[],
        help="a LoRA that visitors may choose; SCALE: 0.7, or with other scales for some layers: 0.7,attn2=0.5; can be given "
        "several times",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the checkpoint that the bundle was exported from: the page offers to draw with eager diffusers too, side by side",
    )
    parser.add_argument(
        "--backend",
        metavar="B",
        default=AUTO,
        help=f"what the page starts with: auto, {', '.join(BACKENDS)} (default: auto, the best one that runs here)",
    )
    add_device(parser)
    parser.add_argument(
        "--memory",
        metavar="MODE",
        default=AUTO,
        help="resident, staged or streaming, as in `generate` (default: auto, the first that fits)",
    )
    add_hub_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    require("demo")
    from sana_export.adapters import parse_lora
    from sana_export.serve.demo.run import serving

    loras = tuple(map(parse_lora, options.lora))
    for lora in loras:
        _ = lora.weights  # it exists
    bundle = bundle_to_read(options, backend=options.backend)
    reference = None
    if options.reference is not None:
        from sana_export.cli.eager_reference import EagerReference

        reference = EagerReference.open(bundle, options.reference, options)
    settings = DemoSettings(
        bundle=bundle,
        host=options.host,
        port=options.port,
        loras=loras,
        backend=options.backend,
        memory=options.memory,
        device=options.device,
        threads=options.threads,
    )
    with serving(settings, reference) as address, contextlib.suppress(KeyboardInterrupt):  # how a page ends, also by SIGTERM
        console.line(f"{address}  (Ctrl-C ends it)")
        threading.Event().wait()
    return Answer({"address": address}, f"{address} is closed")


VERB = Verb(
    name="demo",
    summary="draw with a bundle on a page in the browser",
    description="Serves a page that draws with a bundle: previews, the time of each stage, and eager diffusers side by side.",
    example="sana-export demo bundle --reference tiny",
    add_arguments=add_arguments,
    run=run,
)
