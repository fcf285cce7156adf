"""`sana-export verify`: a bundle against diffusers, or the ranges of its intermediate tensors."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import Answer, Verb, add_bundle, add_model_options, add_size, model_options, positive
from sana_export.errors import ParityError, UsageError
from sana_export.runtime.memory import AUTO


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the checkpoint that the bundle was exported from")
    parser.add_argument(
        "--backend",
        metavar="B",
        help="what runs the bundle (default: the best here; on a CPU fp16 and bf16 graphs run with every intermediate stored in "
        "their precision, as on a GPU)",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--ranges",
        action="store_true",
        help="instead: the largest magnitude of every intermediate tensor and its headroom to 65504, the worst first",
    )
    either.add_argument(
        "--quality",
        action="store_true",
        help="what the pictures show as well: PSNR and SSIM against fp32, and for `tiny` the top-1 of a classifier over 200 "
        "prompts and the reconstruction PSNR of the decoder",
    )
    parser.add_argument("--prompt", metavar="TEXT", nargs="+", action="extend", help="prompts to compare (default: a fixed set)")
    add_size(parser, "the image (default: chosen by the check)")
    parser.add_argument("--steps", type=positive, metavar="N", help="sampling steps (default: 8, or the checkpoint's if less)")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="guidance of the image (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the compared image (default: 42)")
    add_model_options(parser)


#: Options of the command line that are passed on where they are given, by the name of the parameter.
SETTINGS = {
    "prompts": "prompt",
    "height": "height",
    "width": "width",
    "steps": "steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
}


def run(options: argparse.Namespace, console: Console) -> Answer:
    bundle = Path(options.bundle)
    found = {parameter: getattr(options, option) for parameter, option in SETTINGS.items()}
    settings: dict[str, Any] = {parameter: value for parameter, value in found.items() if value is not None}
    if options.ranges:
        require("", "export")
        from sana_export.verify.bundle import Sampling, measure_ranges

        report = measure_ranges(bundle, Sampling(**settings), on_progress=console.show)
        return Answer(report.as_json(), report.as_text())
    if options.reference is None:
        raise UsageError(
            "verify needs the checkpoint to compare with",
            found="no --reference",
            wanted="--reference MODEL, or --ranges",
            fix=f"sana-export verify {options.bundle} --reference MODEL",
        )
    opening = model_options(options, options)
    return compare(bundle, options.reference, console, opening, options.backend, options.quality, **settings)


def compare(
    bundle: Path,
    model: str,
    console: Console,
    opening: Mapping[str, Any],
    backend: str | None = None,
    quality: bool = False,
    **settings: Any,
) -> Answer:
    """The parity report of `bundle` against `model`, which is opened as `opening` says (`model_options`).

    `settings` are those of `Sampling`. The exit code is 5 where a limit is missed.
    """
    require("", "export")
    from sana_export.checkpoint.checkpoint import open_checkpoint
    from sana_export.verify.bundle import Sampling, verify_bundle

    checkpoint = open_checkpoint(model, **opening)
    if not console.live:
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
    report = verify_bundle(
        bundle, checkpoint, Sampling(**settings), backend=backend or AUTO, quality=quality, on_progress=console.show
    )
    return Answer(report.as_json(), report.as_text(), 0 if report.passed else ParityError.exit_code)


VERB = Verb(
    name="verify",
    summary="parity of a bundle with diffusers, graph by graph and for the image",
    description="Compares a bundle with diffusers: every graph, the latents and the image. Exits with 5 where a limit is missed.",
    example="sana-export verify bundle --reference tiny --steps 4",
    add_arguments=add_arguments,
    run=run,
)
