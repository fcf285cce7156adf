"""`sana-export calibrate`: measures what a checkpoint's layers read, for exports that quantize activations."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import plural, size
from sana_export.cli.verb import Answer, Verb, add_model_options, add_names, model_options, path_named, positive
from sana_export.cli.verbs.export import MODEL_HELP
from sana_export.errors import UsageError
from sana_export.manifest import PRECISIONS
from sana_export.quantization.layers import CALIBRATED_PARTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-o", "--output", metavar="FILE", type=path_named("--output"), required=True, help="the calibration file")
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="fp16", help="precision of the export (default: fp16)")
    parser.add_argument(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="as of the export (default: on for the fp16 checkpoints)",
    )
    add_names(parser, "--graphs", "GRAPH", f"the graphs to measure (default: {','.join(CALIBRATED_PARTS)})")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=path_named("--prompts"),
        help="what to draw, one prompt a line (default: 32 captions; those of your own use are better)",
    )
    parser.add_argument("--steps", type=positive, metavar="N", help="sampling steps (default: the checkpoint's own)")
    parser.add_argument("--size", type=positive, metavar="PIXELS", help="height and width of the images (default: the native size)")
    parser.add_argument("--rows", type=positive, metavar="N", help="rows of each layer's input to keep (default: 1024)")
    add_model_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    require("", "export")
    from sana_export.calibration.run import Calibration, calibrate
    from sana_export.checkpoint.checkpoint import open_checkpoint

    if unknown := set(options.graphs) - set(CALIBRATED_PARTS):
        wanted = ", ".join(CALIBRATED_PARTS)
        raise UsageError("a graph that calibration does not run", found=min(unknown), wanted=f"some of {wanted}")
    given: dict[str, Any] = {"steps": options.steps, "size": options.size, "rows": options.rows}
    if options.prompts is not None:
        given["prompts"] = read_prompts(options.prompts)
    measured = calibrate(
        open_checkpoint(options.model, **model_options(options, options)),
        options.output,
        Calibration(**{name: value for name, value in given.items() if value is not None}),
        parts=[part for part in CALIBRATED_PARTS if part in options.graphs or not options.graphs],
        precision=options.dtype,
        clamp=options.clamp,
        on_progress=console.show,
    )
    layers, file_bytes = sum(map(len, measured.layers.values())), measured.path.stat().st_size
    document = {"output": str(measured.path), "bytes": file_bytes, "layers": layers, **asdict(measured.record)}
    text = f"{measured.path}: {size(file_bytes)}, {plural(layers, 'layer')}, {plural(len(measured.record.prompts), 'prompt')}"
    return Answer(document, text)


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises UsageError if it cannot be read or has none."""
    try:
        prompts = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read", found=error, wanted="text in UTF-8, one prompt a line") from error
    if not prompts:
        raise UsageError(f"{path} is empty", found="no prompts", wanted="one prompt a line")
    return prompts


VERB = Verb(
    name="calibrate",
    summary="measure what a checkpoint's layers read, for quantized exports",
    description="Draws images with a checkpoint's graphs in PyTorch and writes what their layers read to a file. An export that "
    "needs a calibration makes one by itself; with a file, several exports share it, and you choose the prompts.",
    example="sana-export calibrate tiny -o calibration.safetensors --prompts prompts.txt",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
