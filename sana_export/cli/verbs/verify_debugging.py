"""`verify --layers` and `verify --polygraphy`: where in a graph a fault is, and files for Polygraphy's own commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import Answer, path_named, positive
from sana_export.errors import ParityError, UsageError
from sana_export.runtime.memory import AUTO

#: Option to the one that it belongs to.
BELONGS = {
    "step": ("layers", "polygraphy"),
    "random_inputs": ("layers",),
    "limit": ("layers",),
    "against": ("layers", "quality"),
    "report": ("quality",),
    "reproducer": ("layers",),
    "profile": ("polygraphy",),
    "scheme": ("sensitivity",),
    "graphs": ("sensitivity",),
    "worst": ("sensitivity",),
}


def decibels(text: str) -> float:
    """A finite number, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of dB, such as 40")
    return number


def add_debugging(parser: argparse.ArgumentParser, either: Any) -> None:
    """The options of this file. `either` is the group of options that exclude each other."""
    either.add_argument(
        "--layers",
        metavar="GRAPH",
        help="instead of comparing with diffusers, compute every tensor of one graph in two ways, compare them with Polygraphy, "
        "and name the first one that drifts (docs/debugging.md)",
    )
    either.add_argument(
        "--polygraphy",
        metavar="DIR",
        type=path_named("--polygraphy"),
        help="instead of comparing, save every graph's inputs and outputs for Polygraphy, and scripts with its commands",
    )
    parser.add_argument(
        "--step", type=positive, metavar="N", help="with --layers or --polygraphy, the step to take inputs from (default: 1)"
    )
    parser.add_argument(
        "--random-inputs", action="store_true", default=None, help="with --layers, random inputs in place of those of a run"
    )
    parser.add_argument(
        "--against",
        metavar="BUNDLE",
        type=path_named("--against"),
        help="with --layers, a bundle of the same structure whose graph is right: finds wrong weights too (default: the bundle "
        "itself in float32); with --quality, a bundle to compare with besides diffusers, such as the one without quantization",
    )
    parser.add_argument(
        "--limit", type=decibels, metavar="DB", help="with --layers, the lowest signal-to-noise ratio (default: verify's own limit)"
    )
    parser.add_argument(
        "--reproducer",
        metavar="DIR",
        type=path_named("--reproducer"),
        help="with --layers, the folder for the part of the graph that drifts (default: GRAPH-drift)",
    )
    parser.add_argument(
        "--profile", metavar="P", help="with --polygraphy, the profile of the engines that its scripts build (default: default)"
    )


def check_debugging(options: argparse.Namespace) -> None:
    """Raise UsageError for an option without the one that it belongs to."""
    for name, owners in BELONGS.items():
        if getattr(options, name) not in (None, []) and not any(getattr(options, owner) for owner in owners):
            wanted = " or ".join(f"--{owner}" for owner in owners)
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} belongs to {wanted}", found=f"{option} alone", wanted="both", fix=f"add {wanted}")


def debug(bundle: Path, options: argparse.Namespace, settings: Mapping[str, Any], console: Console) -> Answer:
    """Run `--layers` or `--polygraphy`. `settings` are those of `Sampling`."""
    require("", "export")
    from sana_export.verify.bundle import Sampling

    sampling, step = Sampling(**settings), options.step or 1
    if options.polygraphy:
        from sana_export.verify.polygraphy_files import write_polygraphy_files

        for name in ("backend", "device"):
            if getattr(options, name) is not None:
                found = f"--{name} {getattr(options, name)}"
                raise UsageError("--polygraphy computes on the CPU", found=found, fix=f"leave out --{name}")
        written = write_polygraphy_files(
            bundle,
            options.polygraphy,
            sampling,
            step=step,
            profile=options.profile or "default",
            threads=options.threads,
            on_progress=console.show,
        )
        return Answer(written.as_json(), written.as_text())
    from sana_export.verify.layers import LayerCheck, compare_layers

    check = LayerCheck(
        options.layers,
        step,
        options.limit,
        bool(options.random_inputs),
        options.backend or AUTO,
        options.against,
        options.reproducer,
    )
    report = compare_layers(bundle, check, sampling, device=options.device, threads=options.threads, on_progress=console.show)
    return Answer(report.as_json(), report.as_text(), 0 if report.passed else ParityError.exit_code)
