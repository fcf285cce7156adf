"""`sana-export verify`: compares a bundle with diffusers, or looks into its graphs (ranges, layers, sensitivity, Polygraphy)."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.progress_bars import without_progress_bars
from sana_export.cli.verb import (
    Answer,
    Verb,
    add_bundle_to_read,
    add_device,
    add_intervals,
    add_model_options,
    add_size,
    bundle_to_read,
    given_intervals,
    model_options,
    path_named,
    positive,
    reference_options,
)
from sana_export.cli.verbs.verify_debugging import add_debugging, check_debugging, debug
from sana_export.cli.verbs.verify_sensitivity import add_sensitivity, sensitivity
from sana_export.errors import ParityError, UsageError
from sana_export.files import disk_errors
from sana_export.runtime.memory import AUTO


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_to_read(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the checkpoint that the bundle was exported from")
    parser.add_argument(
        "--backend",
        metavar="B",
        help="what runs the bundle (default: for fp32 the best one that runs here; fp16 and bf16 graphs run on the CPU with every "
        "intermediate rounded to their precision, as on a GPU, unless --device is given)",
    )
    add_device(parser)
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--ranges",
        action="store_true",
        help="instead of comparing, list the largest magnitude of every intermediate tensor and its headroom to 65504, worst first",
    )
    either.add_argument(
        "--quality",
        action="store_true",
        help="also measure image quality: PSNR and SSIM against diffusers in fp32 and the bundle of --against, blank and saturated "
        "images, and for `tiny` the top-1 accuracy of a classifier over 200 prompts and the reconstruction PSNR of the decoder",
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        type=path_named("--report"),
        help="with --quality, the folder for quality.html: figures, a table of the prompts, and the worst images side by side",
    )
    add_debugging(parser, either)
    add_sensitivity(parser, either)
    add_intervals(parser, "with --quality, also what it costs to have ")
    parser.add_argument("--prompt", metavar="TEXT", nargs="+", action="extend", help="prompts to compare (default: a fixed set)")
    add_size(parser, "the image (default: 256, or the native size if smaller)")
    parser.add_argument(
        "--steps",
        type=positive,
        metavar="N",
        help="sampling steps (default: 8, or the checkpoint's if fewer; for the images of --quality the checkpoint's)",
    )
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="guidance scale (default: the checkpoint's)")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the images (default: 42)")
    add_model_options(parser)


#: Parameter of `Sampling` to the option that sets it, if it is given.
SETTINGS = {
    "prompts": "prompt",
    "height": "height",
    "width": "width",
    "steps": "steps",
    "guidance_scale": "guidance_scale",
    "seed": "seed",
}


def run(options: argparse.Namespace, console: Console) -> Answer:
    found = {parameter: getattr(options, option) for parameter, option in SETTINGS.items()}
    settings: dict[str, Any] = {parameter: value for parameter, value in found.items() if value is not None}
    check_debugging(options)
    intervals = given_intervals(options)
    if intervals and not options.quality:
        name = next(iter(intervals)).replace("_", "-")
        fix = "add --quality"
        raise UsageError(f"--{name} belongs to --quality", found=f"--{name} without --quality", wanted="both", fix=fix)
    if options.layers or options.polygraphy:
        return debug(bundle_to_read(options, backend=options.backend), options, settings, console)
    if options.sensitivity:
        return sensitivity(bundle_to_read(options), options, settings, console)
    if options.ranges:
        require("", "export")
        from sana_export.verify.bundle import Sampling, measure_ranges

        if options.device is not None:
            raise UsageError("--ranges runs on the CPU", found=f"--device {options.device}", fix="leave out --device")
        report = measure_ranges(bundle_to_read(options), Sampling(**settings), threads=options.threads, on_progress=console.show)
        return Answer(report.as_json(), report.as_text())
    if options.reference is None:
        raise UsageError(
            "verify needs the checkpoint to compare with",
            found="no --reference",
            wanted="--reference MODEL, or --ranges, --layers, --sensitivity or --polygraphy",
            fix=f"sana-export verify {shlex.quote(options.bundle)} {reference_options(Path(options.bundle))}",
        )
    opening = model_options(options, options)
    return compare(
        bundle_to_read(options, backend=options.backend),
        options.reference,
        console,
        opening,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        quality=options.quality,
        against=options.against,
        report_folder=options.report,
        intervals=intervals,
        **settings,
    )


def compare(
    bundle: Path,
    model: str,
    console: Console,
    opening: Mapping[str, Any],
    *,
    backend: str | None = None,
    device: int | None = None,
    threads: int | None = None,
    quality: bool = False,
    against: Path | None = None,
    report_folder: Path | None = None,
    intervals: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    **settings: Any,
) -> Answer:
    """The parity report of `bundle` against the checkpoint `model`, which is opened with `opening` (`model_options`).

    `settings` are those of `Sampling`, `intervals` those of `Intervals`. With `quality`, `against` is a bundle to compare with too,
    and the folder `report_folder` gets a page, whose path is the last line of the text and `report` in the document. Exit code 5 if
    a limit is missed.
    """
    require("", "export")
    from sana_export.checkpoint.checkpoint import open_checkpoint
    from sana_export.verify.bundle import Sampling, verify_bundle
    from sana_export.verify.intervals import Intervals
    from sana_export.verify.quality.page import write_page

    checkpoint = open_checkpoint(model, **opening)
    if report_folder is not None:
        with disk_errors(report_folder):  # now, not after minutes of measuring
            report_folder.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if console.live else without_progress_bars():
        report = verify_bundle(
            bundle,
            checkpoint,
            Sampling(**settings),
            backend=backend or AUTO,
            device=device,
            threads=threads,
            quality=quality,
            against=against,
            intervals=Intervals(**intervals),
            on_progress=console.show,
        )
    document, text = report.as_json(), report.as_text()
    if report_folder is not None and report.quality is not None:
        path = write_page(report.quality, report_folder)
        document, text = {**document, "report": str(path)}, f"{text}\n{path}"
    return Answer(document, text, 0 if report.passed else ParityError.exit_code)


VERB = Verb(
    name="verify",
    summary="compare a bundle with diffusers, graph by graph and image by image",
    description="Compares a bundle with diffusers: every graph, the latents and the images. Exits with 5 if a limit is missed.",
    example="sana-export verify bundle --reference tiny --steps 4\nsana-export verify bundle --layers denoiser",
    add_arguments=add_arguments,
    run=run,
)
