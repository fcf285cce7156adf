"""`verify --sensitivity`: each layer of a bundle's graphs quantized alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import Answer, add_names, positive
from sana_export.errors import UsageError
from sana_export.quantization.schemes import SCHEMES

#: Layers of each graph that are printed.
WORST = 10


def add_sensitivity(parser: argparse.ArgumentParser, either: Any) -> None:
    """The options of this file. `either` is the group of options that exclude each other."""
    either.add_argument(
        "--sensitivity",
        action="store_true",
        help="instead of comparing with diffusers, quantize each layer alone and rank the layers by the damage to their graph's "
        "outputs (docs/quantization.md)",
    )
    add_names(
        parser, "--scheme", "SCHEME", f"with --sensitivity, the schemes: {', '.join(SCHEMES)} (default: int8-weight,int4-weight)"
    )
    add_names(
        parser,
        "--graphs",
        "GRAPH",
        "with --sensitivity, the graphs (default: text_encoder, context, denoiser and vae_decoder)",
    )
    parser.add_argument(
        "--worst", type=positive, metavar="N", help=f"with --sensitivity, the layers of each graph to list (default: {WORST})"
    )


def sensitivity(bundle: Path, options: argparse.Namespace, settings: Mapping[str, Any], console: Console) -> Answer:
    """Run `--sensitivity`. `settings` are those of `Sampling`."""
    require("", "export")
    from sana_export.verify.bundle import Sampling
    from sana_export.verify.sensitivity import SensitivityCheck, measure_sensitivity

    for name in ("backend", "device"):
        if (found := getattr(options, name)) is not None:
            raise UsageError("--sensitivity computes on the CPU", found=f"--{name} {found}", fix=f"leave out --{name}")
    given = {"graphs": options.graphs, "schemes": options.scheme}
    check = SensitivityCheck(**{name: tuple(words) for name, words in given.items() if words})
    report = measure_sensitivity(bundle, check, Sampling(**settings), threads=options.threads, on_progress=console.show)
    return Answer(report.as_json(), report.as_text(options.worst or WORST))
