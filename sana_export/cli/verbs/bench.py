"""`sana-export bench`: times backends against eager diffusers, compares reports, profiles graphs and computes lower bounds."""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import (
    Answer,
    Verb,
    add_bundle_to_read,
    add_device,
    add_model_options,
    add_names,
    bundle_to_read,
    model_options,
    path_named,
    positive,
    reference_options,
    whole,
)
from sana_export.errors import DependencyError, ParityError, UsageError
from sana_export.numeric import MAX_ROUNDS, MAX_SIDE

DEFAULT_BACKENDS = ("onnxruntime",)
DEFAULT_WORKLOAD = "cpu"
DEFAULT_OUTPUT = Path("benchmarks/out")
DEFAULT_THRESHOLD = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_to_read(parser, nargs="?")
    parser.add_argument("--reference", metavar="MODEL", help="the checkpoint that eager diffusers runs")
    add_names(
        parser,
        "--backend",
        "B",
        f"backends to time against eager diffusers; `all` takes every one that runs here (default: {', '.join(DEFAULT_BACKENDS)})",
    )
    parser.add_argument(
        "--workload",
        metavar="NAME",
        default=DEFAULT_WORKLOAD,
        help=f"a built-in workload or a TOML file (default: {DEFAULT_WORKLOAD})",
    )
    add_names(parser, "--prompts", "SET", "sets of prompts instead of the workload's: short, long, chinese, emoji")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=path_named("--output"),
        help=f"folder for the report (default: {DEFAULT_OUTPUT}/WORKLOAD)",
    )
    add_device(parser, "the workload's, or every core")
    modes = parser.add_argument_group("instead of a run").add_mutually_exclusive_group()
    modes.add_argument(
        "--compare",
        metavar="REPORT",
        nargs=2,
        type=path_named("--compare"),
        help="show what got better or worse between two bench.json files, or two reports of make gpu-check",
    )
    modes.add_argument("--profile", action="store_true", help="show the slowest layers of each graph in one backend")
    modes.add_argument(
        "--decoders",
        metavar="VAE",
        nargs="+",
        help="time the decoders of autoencoders beside each other, in float32 on the CPU: names or folders as for export --vae",
    )
    modes.add_argument("--floor", action="store_true", help="compute the shortest possible times of published models on known GPUs")
    parser.add_argument(
        "--sides",
        metavar="PIXELS",
        type=whole(1, MAX_SIDE),
        nargs="+",
        default=[512, 1024],
        help="with --decoders: heights and widths of the images (default: 512 1024)",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=whole(1, MAX_ROUNDS), default=5, help="with --decoders: timed rounds (default: 5)"
    )
    parser.add_argument(
        "--threshold",
        metavar="PERCENT",
        type=percent,
        default=DEFAULT_THRESHOLD,
        help=f"with --compare: how much worse a time may get (default: {DEFAULT_THRESHOLD:.0%}%)",
    )
    add_names(parser, "--graphs", "GRAPH", "with --profile: only these graphs")
    parser.add_argument(
        "--top", metavar="N", type=positive, default=10, help="with --profile: layers to list for each graph (default: 10)"
    )
    add_model_options(parser)


def percent(text: str) -> float:
    """ "5%" or "5" as 0.05, for argparse."""
    if not re.fullmatch(r"\d+(\.\d+)?%?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage such as 5%")
    return float(text.rstrip("%")) / 100


def run(options: argparse.Namespace, console: Console) -> Answer:
    if options.compare:
        before, after = options.compare
        return _compare(before, after, options.threshold)
    require("", "export")
    if options.floor:
        return _floor()
    if options.decoders:
        return _decoders(options, console)
    if options.bundle is None:
        raise UsageError("bench needs BUNDLE", wanted=VERB.example, fix="sana-export bench --help")
    if options.reference is None:
        fix = f"sana-export bench {shlex.quote(options.bundle)} {reference_options(Path(options.bundle))}"
        raise UsageError("bench needs --reference MODEL", wanted="the checkpoint that the bundle was exported from", fix=fix)
    opening = model_options(options, options)
    if options.profile:
        if options.device is not None:
            raise UsageError("--profile takes no --device", found=f"--device {options.device}", fix="leave out --device")
        return _profile(options, console, opening)
    output = DEFAULT_OUTPUT / Path(options.workload).stem if options.output is None else options.output
    return measure(
        bundle_to_read(options),
        options.reference,
        console,
        opening,
        backends=tuple(options.backend),
        workload=options.workload,
        output=output,
        prompts=tuple(options.prompts),
        device=options.device,
        threads=options.threads,
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
    prompts: tuple[str, ...] = (),
    device: int | None = None,
    threads: int | None = None,
) -> Answer:
    """Time `backends` against eager diffusers on the checkpoint `model`, which is opened with `opening` (`model_options`).

    `prompts` are sets of prompts that replace the workload's, and `threads` replaces its number of threads. The JSON file's path is
    the last line of the text and `report` in the document. Exit code 5 if an image differs from eager's, 3 if a backend failed.
    """
    require("", "export")
    from sana_export.bench.candidates.table import BASELINE
    from sana_export.bench.report.document import document
    from sana_export.bench.report.text import markdown
    from sana_export.bench.run import run_bench
    from sana_export.bench.workload import Workload, load_workload, prompts_of
    from sana_export.checkpoint.checkpoint import open_checkpoint

    work: str | Workload = workload
    if prompts:
        work = dataclasses.replace(load_workload(workload), prompts=prompts_of(prompts, "--prompts"))
    checkpoint = open_checkpoint(model, **opening)
    names = (BASELINE, *(backends or DEFAULT_BACKENDS))
    settings: dict[str, Any] = {"backends": names, "workload": work, "output": output, "device": device, "threads": threads}
    report = run_bench(bundle, checkpoint, **settings, on_progress=console.show)
    exit_code = DependencyError.exit_code if report.failed else 0
    path = None if output is None else str(output / "bench.json")
    text = markdown(report) + (f"\n{path}" if path else "")
    return Answer({**document(report), "report": path}, text, exit_code if report.agrees else ParityError.exit_code)


def _compare(before: Path, after: Path, threshold: float) -> Answer:
    """Exit code 5 if something got worse by more than the threshold and the spread, or a backend is missing."""
    from sana_export.bench.report.compare import compare_files

    found = compare_files(before, after, threshold)
    return Answer(found.as_json(), found.as_text(), 0 if found.passed else ParityError.exit_code)


def _floor() -> Answer:
    from sana_export.bench.work import floors

    return Answer({"floors": floors.as_json()}, floors.markdown())


def _decoders(options: argparse.Namespace, console: Console) -> Answer:
    """Exit code 5 if an image differs from diffusers'."""
    from sana_export.bench.decoders import compare_decoders
    from sana_export.checkpoint.checkpoint import open_checkpoint

    opening = model_options(options, options)
    # The transformer is not run: that of any Sana will do.
    checkpoints = [open_checkpoint("tiny-random", **{**opening, "vae": vae}) for vae in options.decoders]
    report = compare_decoders(
        checkpoints, sides=options.sides, rounds=options.rounds, threads=options.threads, on_progress=console.show
    )
    passed = all(row.passed for row in report.parity)
    return Answer(report.as_json(), report.as_text(), 0 if passed else ParityError.exit_code)


def _profile(options: argparse.Namespace, console: Console, opening: Mapping[str, Any]) -> Answer:
    """Exit code 3 if a graph could not be run."""
    from sana_export.bench.profile.profile import run_profile
    from sana_export.bench.workload import load_workload
    from sana_export.checkpoint.checkpoint import open_checkpoint

    names = options.backend or list(DEFAULT_BACKENDS)
    if len(names) > 1:
        raise UsageError("--profile takes one backend", found=", ".join(names), wanted="one name", fix=f"--backend {names[0]}")
    workload = load_workload(options.workload)
    profile = run_profile(
        bundle_to_read(options, backend=names[0]),
        open_checkpoint(options.reference, **opening),
        backend=names[0],
        workload=workload if options.threads is None else dataclasses.replace(workload, threads=options.threads),
        graphs=options.graphs,
        on_progress=console.show,
    )
    return Answer(profile.as_json(), profile.as_text(options.top), DependencyError.exit_code if profile.failed else 0)


VERB = Verb(
    name="bench",
    summary="time backends against eager diffusers, stage by stage",
    description="Times backends and eager diffusers in turns, in one run, and checks that their images agree.",
    example="sana-export bench bundle --reference mid --workload cpu -o report\n"
    "  sana-export bench --compare before/bench.json after/bench.json --threshold 5%\n"
    "  sana-export bench bundle --reference mid --profile --backend onnxruntime\n"
    "  sana-export bench --decoders mid-dc-ae mid-dc-ae-lite --sides 512",
    add_arguments=add_arguments,
    run=run,
)
