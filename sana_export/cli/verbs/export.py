"""`sana-export export`: exports a checkpoint to a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sana_export.cli.bundle_text import bundle_document, bundle_summary
from sana_export.cli.packages import require
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import seconds, size, table
from sana_export.cli.verb import Answer, Verb, add_model_options, add_names, model_options, path_named
from sana_export.errors import UsageError
from sana_export.manifest import PRECISIONS, Manifest
from sana_export.progress import Progress
from sana_export.quantization.method import WORDS
from sana_export.quantization.schemes import SCHEMES

#: What MODEL may be.
MODEL_HELP = "alias (see variants), hub id, or local folder in diffusers' format"
#: The options that only a bundle has, and their attributes.
_OF_BUNDLES = {
    "--pag-layers": "pag_layers",
    "--graphs": "graphs",
    "--quantize": "quantize",
    "--quantize-method": "quantize_method",
    "--calibration": "calibration",
    "--controlnet": "controlnet",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-o", "--output", metavar="BUNDLE", type=path_named("--output"), required=True, help="folder of the bundle")
    add_export_options(parser)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Everything except the model and the output folder."""
    parser.add_argument(
        "--layout",
        choices=("bundle", "optimum"),
        default="bundle",
        help="bundle: what `build` and `generate` read; optimum: one ONNX file for each component, with optimum's names, for other "
        "ONNX Runtime programs (default: bundle)",
    )
    parser.add_argument("--dtype", choices=tuple(PRECISIONS), default="fp16", help="precision of the graphs (default: fp16)")
    add_names(
        parser,
        "--pag-layers",
        "LAYER",
        "layers that support perturbed attention guidance, for example transformer_blocks.8 (default: none)",
    )
    add_names(
        parser,
        "--graphs",
        "GRAPH",
        "the graphs to export, or groups of them: default,img2img adds image-to-image and inpainting (default: default, which "
        "draws images from text; with --controlnet the groups default, img2img and control)",
    )
    add_names(
        parser,
        "--quantize",
        "SCHEME",
        f"store quantized weights: {' or '.join(SCHEMES)} for all parts of the bundle that take it, or PART=SCHEME, for "
        "example text_encoder=int4-weight,denoiser=none (default: none)",
    )
    add_names(
        parser,
        "--quantize-method",
        "STEP",
        f"how quantized numbers are chosen: {', '.join(WORDS)} (default: each scheme's own)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=path_named("--calibration"),
        help="a file of `sana-export calibrate` (default: if --quantize needs one, it is measured now)",
    )
    parser.add_argument(
        "--clamp",
        action=argparse.BooleanOptionalAction,
        help="clip self-attention outputs to +-65504, as in the training of the fp16 checkpoints (default: on for those)",
    )
    add_model_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    output = options.output
    if options.layout == "optimum":
        return _export_components(options, console)
    manifest = export_model(
        options.model,
        output,
        console,
        model_options(options, options),
        precision=options.dtype,
        pag_layers=options.pag_layers,
        clamp=options.clamp,
        graphs=options.graphs,
        quantize=options.quantize,
        quantize_method=options.quantize_method,
        calibration=options.calibration,
    )
    return Answer(bundle_document(output, manifest), bundle_summary(output, manifest))


def export_model(
    model: str,
    output: Path,
    console: Console,
    opening: Mapping[str, Any],
    **options: Any,
) -> Manifest:
    """Open the checkpoint `model` with `opening` (`model_options`) and export it with `options` (those of `export_bundle`).

    Without a calibration, one is measured if the export takes one.
    """
    require("", "export")
    from sana_export.calibration.run import Calibration
    from sana_export.checkpoint.checkpoint import open_checkpoint
    from sana_export.export.bundle import export_bundle

    checkpoint, options["calibration"] = open_checkpoint(model, **opening), options["calibration"] or Calibration()
    return export_bundle(checkpoint, output, on_progress=lambda progress: _show(console, progress), **options)


def _export_components(options: argparse.Namespace, console: Console) -> Answer:
    """The same for `--layout optimum`."""
    if given := [option for option, name in _OF_BUNDLES.items() if getattr(options, name)]:
        raise UsageError(
            "optimum's layout does not take every option of a bundle",
            found=f"{', '.join(given)} with --layout optimum",
            wanted="a bundle with these options, or optimum's layout without them",
            fix=f"omit {', '.join(given)}, or --layout optimum",
        )
    require("", "export")
    from sana_export.checkpoint.checkpoint import open_checkpoint
    from sana_export.export.component_layout import export_components

    checkpoint = open_checkpoint(options.model, **model_options(options, options))
    layout = export_components(
        checkpoint,
        options.output,
        precision=options.dtype,
        clamp=options.clamp,
        on_progress=lambda progress: _show(console, progress),
    )
    document = {
        "layout": "optimum",
        "output": str(options.output),
        "checkpoint": asdict(layout.checkpoint),
        "options": asdict(layout.options),
        "components": {name: asdict(spec) for name, spec in layout.components.items()},
        "bytes": layout.bytes,
        "export_key": layout.export_key,
        "tool_version": layout.tool_version,
    }
    rows = [
        (name, ", ".join(tensor.name for tensor in spec.inputs), spec.outputs[0].name) for name, spec in layout.components.items()
    ]
    text = f"{options.output}: {size(layout.bytes)}, {layout.checkpoint.source}, {layout.options.precision}\n"
    return Answer(document, text + table(rows, ("component", "inputs", "output"), "  "))


def _show(console: Console, progress: Progress) -> None:
    if not progress.bytes_total:  # calibration writes little
        console.show(progress)
        return
    written = f"{size(progress.bytes_done)} of {size(progress.bytes_total)} written"
    left = "" if progress.seconds_left is None else f", about {seconds(progress.seconds_left)} left"
    console.show(replace(progress, doing=f"{progress.doing} ({written}{left})"))


VERB = Verb(
    name="export",
    summary="export a checkpoint to a bundle of ONNX graphs",
    description="Exports a Sana checkpoint to a bundle: ONNX graphs, tokenizer, embeddings, and a manifest with their hashes.",
    example="sana-export export tiny -o bundle --dtype fp16 --pag-layers transformer_blocks.1",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
