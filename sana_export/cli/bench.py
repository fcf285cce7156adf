"""`sana-export bench`: how long each backend takes beside eager diffusers, stage by stage."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.console import Console
from sana_export.cli.packages import require
from sana_export.cli.verb import Answer, Verb, add_bundle, add_model_options, add_names, model_options
from sana_export.errors import DependencyError, ParityError

DEFAULT_BACKENDS = ("onnxruntime",)
DEFAULT_WORKLOAD = "cpu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--reference", metavar="MODEL", required=True, help="the checkpoint that eager diffusers runs")
    add_names(parser, "--backend", "B", f"what to time beside eager diffusers (default: {', '.join(DEFAULT_BACKENDS)})")
    parser.add_argument(
        "--workload", metavar="NAME", default=DEFAULT_WORKLOAD, help=f"name or TOML file (default: {DEFAULT_WORKLOAD})"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="write the report into this folder too, as JSON and Markdown")
    add_model_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    return measure(
        Path(options.bundle),
        options.reference,
        console,
        model_options(options, options),
        backends=tuple(options.backend),
        workload=options.workload,
        output=None if options.output is None else Path(options.output),
    )


def measure(
    bundle: Path,
    model: str,
    console: Console,
    opening: Mapping[str, Any],
    *,
    backends: tuple[str, ...],
    workload: str,
    output: Path | None,
) -> Answer:
    """Time `backends` beside eager diffusers on `model`, opened as `opening` says (`model_options`).

    Exit code 5 where an image differs from eager's, 3 where a backend failed.
    """
    require("", "export")
    from sana_export.bench.candidates import BASELINE
    from sana_export.bench.run import run_bench
    from sana_export.graphs.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(model, **opening)
    names = (BASELINE, *(backends or DEFAULT_BACKENDS))
    report = run_bench(bundle, checkpoint, backends=names, workload=workload, output=output, on_progress=console.step)
    exit_code = DependencyError.exit_code if report.failed else 0
    return Answer(report.as_json(), report.as_text(), exit_code if report.agrees else ParityError.exit_code)


VERB = Verb(
    name="bench",
    summary="latency of each backend beside eager diffusers, stage by stage",
    description="Times backends beside eager diffusers in one run, taking turns, and checks that their images agree.",
    example="sana-export bench bundle --reference mid --workload cpu -o report",
    add_arguments=add_arguments,
    run=run,
)
