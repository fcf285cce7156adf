"""`sana-export bench`: how long each backend takes beside eager diffusers, and what follows from such runs."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.packages import require
from sana_export.cli.terminal.console import Console
from sana_export.cli.verb import Answer, Verb, add_model_options, add_names, model_options, positive
from sana_export.errors import DependencyError, ParityError, UsageError
from sana_export.progress import OnProgress

DEFAULT_BACKENDS = ("onnxruntime",)
DEFAULT_WORKLOAD = "cpu"
DEFAULT_OUTPUT = Path("benchmarks/out")
DEFAULT_THRESHOLD = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", nargs="?", help="a folder made by `sana-export export`")
    parser.add_argument("--reference", metavar="MODEL", help="the checkpoint that eager diffusers runs")
    add_names(
        parser,
        "--backend",
        "B",
        f"what to time beside eager diffusers, or `all` that can run here (default: {', '.join(DEFAULT_BACKENDS)})",
    )
    parser.add_argument(
        "--workload", metavar="NAME", default=DEFAULT_WORKLOAD, help=f"name or TOML file (default: {DEFAULT_WORKLOAD})"
    )
    add_names(parser, "--prompts", "SET", "sets of prompts in place of the workload's: short, long, chinese, emoji")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help=f"folder for the report (default: {DEFAULT_OUTPUT}/WORKLOAD)"
    )
    modes = parser.add_argument_group("in place of a run").add_mutually_exclusive_group()
    modes.add_argument(
        "--compare", metavar="REPORT", nargs=2, type=Path, help="what got better or worse from one bench.json to another"
    )
    modes.add_argument("--profile", action="store_true", help="the slowest layers of each graph in one backend")
    modes.add_argument("--floor", action="store_true", help="least times of published models on known GPUs, computed")
    parser.add_argument(
        "--threshold",
        metavar="PERCENT",
        type=percent,
        default=DEFAULT_THRESHOLD,
        help=f"with --compare: what may get worse (default: {DEFAULT_THRESHOLD:.0%}%)",
    )
    add_names(parser, "--graphs", "GRAPH", "with --profile: only these graphs")
    parser.add_argument("--top", metavar="N", type=positive, default=10, help="with --profile: layers a graph (default: 10)")
    add_model_options(parser)


def percent(text: str) -> float:
    """ "5%" or "5" as 0.05, for argparse."""
    if not re.fullmatch(r"\d+(\.\d+)?%?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage, for example 5%")
    return float(text.rstrip("%")) / 100


def run(options: argparse.Namespace, console: Console) -> Answer:
    if options.compare:
        before, after = options.compare
        return _compare(before, after, options.threshold)
    require("", "export")
    if options.floor:
        return _floor()
    for name, value in (("BUNDLE", options.bundle), ("--reference MODEL", options.reference)):
        if value is None:
            raise UsageError(f"bench needs {name}", wanted=VERB.example, fix="sana-export bench --help")
    opening = model_options(options, options)
    if options.profile:
        return _profile(options, console, opening)
    output = DEFAULT_OUTPUT / Path(options.workload).stem if options.output is None else options.output
    return measure(
        Path(options.bundle),
        options.reference,
        console,
        opening,
        backends=tuple(options.backend),
        workload=options.workload,
        output=output,
        prompts=tuple(options.prompts),
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
) -> Answer:
    """Time `backends` beside eager diffusers on `model`, opened as `opening` says (`model_options`).

    The last line of the text, and `report` of the document, name the JSON file. Exit code 5 where an image differs from eager's,
    3 where a backend failed.
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
    report = run_bench(bundle, checkpoint, backends=names, workload=work, output=output, on_progress=_show(console))
    exit_code = DependencyError.exit_code if report.failed else 0
    path = None if output is None else str(output / "bench.json")
    text = markdown(report) + (f"\n{path}" if path else "")
    return Answer({**document(report), "report": path}, text, exit_code if report.agrees else ParityError.exit_code)


def _show(console: Console) -> OnProgress:
    return lambda progress: console.step(progress.doing, int(progress.done), int(progress.total))


def _compare(before: Path, after: Path, threshold: float) -> Answer:
    """Exit code 5 where something got worse by more than the threshold and the spread, or a backend was lost."""
    from sana_export.bench.report.compare import compare_files

    found = compare_files(before, after, threshold)
    return Answer(found.as_json(), found.as_text(), 0 if found.passed else ParityError.exit_code)


def _floor() -> Answer:
    from sana_export.bench.work import floors

    return Answer({"floors": floors.as_json()}, floors.markdown())


def _profile(options: argparse.Namespace, console: Console, opening: Mapping[str, Any]) -> Answer:
    """Exit code 3 where a graph could not be run."""
    from sana_export.bench.profile.profile import run_profile
    from sana_export.bench.workload import load_workload
    from sana_export.checkpoint.checkpoint import open_checkpoint

    names = options.backend or list(DEFAULT_BACKENDS)
    if len(names) > 1:
        raise UsageError("a profile is of one backend", found=", ".join(names), wanted="one name", fix=f"--backend {names[0]}")
    profile = run_profile(
        Path(options.bundle),
        open_checkpoint(options.reference, **opening),
        backend=names[0],
        workload=load_workload(options.workload),
        graphs=options.graphs,
        on_progress=_show(console),
    )
    return Answer(profile.as_json(), profile.as_text(options.top), DependencyError.exit_code if profile.failed else 0)


VERB = Verb(
    name="bench",
    summary="latency of each backend beside eager diffusers, stage by stage",
    description="Times backends beside eager diffusers in one run, taking turns, and checks that their images agree.",
    example="sana-export bench bundle --reference mid --workload cpu -o report\n"
    "  sana-export bench --compare before/bench.json after/bench.json --threshold 5%\n"
    "  sana-export bench bundle --reference mid --profile --backend onnxruntime",
    add_arguments=add_arguments,
    run=run,
)
