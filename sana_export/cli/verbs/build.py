"""`sana-export build`: builds the engines of a bundle."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sana_export.cli.bundle_text import bundle_document, bundle_origin, bundle_summary
from sana_export.cli.packages import require
from sana_export.cli.terminal.console import VERBOSE, Console
from sana_export.cli.terminal.text import plural, table
from sana_export.cli.verb import Answer, Verb, add_bundle, add_names, add_size, positive
from sana_export.errors import UsageError
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import PROFILES, Profile, bin_profiles, custom_profile, profile_named
from sana_export.progress import Progress
from sana_export.trt.bundle import build_bundle, list_layers, plan_bundle
from sana_export.trt.flavour import FLAVOURS
from sana_export.trt.options import BUILD_OPTIONS, DEFAULT_OPTIONS, BuildOptions
from sana_export.trt.plan import KEY_CHARACTERS, PlannedEngine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--backend", choices=tuple(FLAVOURS), required=True, help="the library that will run the engines")
    profiles = "; ".join(f"{profile.name}: {profile.meaning}" for profile in PROFILES.values())
    parser.add_argument(
        "--profile",
        metavar="NAME",
        help=f"the shapes that the engines accept. {profiles}; static-1024 or static-HEIGHTxWIDTH: that size (default: default)",
    )
    parser.add_argument(
        "--each-bin",
        action="store_true",
        help="build engines of one size for every resolution bin of the checkpoint, instead of a profile",
    )
    add_size(parser, "the only image size of the engines, instead of a profile")
    parser.add_argument("--batch", type=positive, metavar="N", help="at most N images at a time, instead of a profile (default: 1)")
    add_names(
        parser,
        "--compute-capability",
        "CC",
        "GPUs to build for, such as 8.9 12.0 (default: tensorrt-rtx all that it supports, tensorrt this machine's GPU)",
    )
    add_names(parser, "--graphs", "GRAPH", "build only these graphs (default: all that the profile needs)")
    parser.add_argument(
        "--refittable",
        action="store_true",
        help="build engines without weights; loading adds them, so that one engine serves all fine-tunes of a checkpoint. "
        "Building requires a GPU",
    )
    parser.add_argument(
        "--version-compatible", action="store_true", help="build engines that also run on later versions of the backend"
    )
    parser.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="build engines that run on all GPUs of compute capability 8.0 or later; tensorrt-rtx: add --compute-capability 8.0",
    )
    parser.add_argument(
        "--weight-streaming",
        action="store_true",
        help="build engines for --memory streaming: weights stay in host memory",
    )
    instead = parser.add_argument_group("instead of building").add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list what would be built and why")
    instead.add_argument(
        "--layers",
        action="store_true",
        help="compile and list the layers after fusion, with their FLOP and bytes at the profile's typical sizes; keep nothing",
    )


def run(options: argparse.Namespace, console: Console) -> Answer:
    bundle = options.bundle
    manifest = Manifest.load(bundle)
    profiles = choose_profiles(manifest, options)
    settings: dict[str, Any] = {
        "backend": options.backend,
        "compute_capabilities": tuple(options.compute_capability),
        "graphs": options.graphs or None,
        "options": BuildOptions(**{name: getattr(options, name) for name in BUILD_OPTIONS}),
    }
    if options.dry_run:
        # Engines that several profiles share are planned once.
        planned = {engine.spec.key: engine for profile in profiles for engine in plan_bundle(bundle, profile=profile, **settings)}
        return Answer(_plan_document(bundle, [*planned.values()]), _plan_text(bundle, [*planned.values()]))
    if options.layers:
        every = [engine for profile in profiles for engine in plan_bundle(bundle, profile=profile, **settings)]
        return _layers(bundle, console, options, every)
    for profile in profiles:
        manifest = build_engines(bundle, console, profile=profile, **settings)
    return Answer(bundle_document(bundle, manifest), bundle_summary(bundle, manifest))


def choose_profiles(manifest: Manifest, options: argparse.Namespace) -> list[Profile]:
    """The profiles that the options select."""
    if not options.each_bin:
        return [choose_profile(manifest, options.profile, options.height, options.width, options.batch)]
    if any(value is not None for value in (options.profile, options.height, options.width, options.batch)):
        raise UsageError(
            "--each-bin cannot be combined with --profile, --height, --width or --batch",
            found="--each-bin and one of these",
            wanted="only one of them",
        )
    return bin_profiles(manifest.model)


def choose_profile(manifest: Manifest, name: str | None, height: int | None, width: int | None, batch: int | None) -> Profile:
    """The profile `name`, or one of exactly one size. Raises UsageError if both are given."""
    exact = height is not None or width is not None or batch is not None
    if name is not None and exact:
        raise UsageError(
            "--profile cannot be combined with --height, --width or --batch",
            found=f"--profile {name} and a size or a batch",
            wanted="only one of them",
        )
    if exact:
        return custom_profile(manifest.model, height=height, width=width, batch=batch or 1)
    return profile_named(name or "default")


def build_engines(
    bundle: Path,
    console: Console,
    *,
    backend: str,
    profile: Profile,
    compute_capabilities: tuple[str, ...],
    graphs: Sequence[str] | None = None,
    options: BuildOptions = DEFAULT_OPTIONS,
) -> Manifest:
    """Build the engines that are missing or stale, with progress on the console."""
    settings: dict[str, Any] = {
        "backend": backend,
        "profile": profile,
        "compute_capabilities": compute_capabilities,
        "graphs": graphs or None,
        "options": options,
    }
    total, done, label = sum(not engine.exists for engine in plan_bundle(bundle, **settings)), 0, ""

    def on_engine(engine: PlannedEngine, entry: EngineEntry | None) -> None:
        nonlocal done, label
        if entry is None:
            label = f"{engine.spec.graph} ({engine.reason})"
            console.step(label, done, total)
        else:
            done += 1

    def on_progress(progress: Progress) -> None:
        if console.live:
            console.step(label, done, total, min(progress.done - done, 1.0))

    return build_bundle(bundle, **settings, on_engine=on_engine, on_progress=on_progress)


def _layers(bundle: Path, console: Console, options: argparse.Namespace, planned: Sequence[PlannedEngine]) -> Answer:
    """The account of each engine's layers at the typical sizes of its profile. Compiles each engine twice."""
    require("", "export")
    from sana_export.bench.work.floors import CARDS
    from sana_export.bench.work.layers import make_account

    accounts, manifest = [], Manifest.load(bundle)
    for index, engine in enumerate(planned):
        spec, sizes = engine.spec, {axis: typical for axis, (_, typical, _) in engine.spec.ranges.items()}
        console.step(f"{spec.graph} at one size", 2 * index, 2 * len(planned))
        layers = list_layers(bundle, engine, {axis: (size, size, size) for axis, size in sizes.items()})
        console.step(f"{spec.graph} for the profile {engine.profile}", 2 * index + 1, 2 * len(planned))
        in_profile = list_layers(bundle, engine, spec.ranges)
        onnx = bundle / manifest.graphs[spec.graph].onnx.path
        accounts.append(make_account(spec.graph, engine.profile, onnx, sizes, layers, in_profile))
    console.step("", 2 * len(planned), 2 * len(planned))
    target = f"{options.backend} {planned[0].spec.backend_version}, {', '.join(options.compute_capability) or 'portable'}"
    title = f"# Layers after fusion: {bundle_origin(manifest)}; {target}"
    document = {"bundle": str(bundle), "accounts": [account.as_json(CARDS) for account in accounts]}
    return Answer(document, "\n\n".join([title, *(account.as_text(CARDS) for account in accounts)]))


def _plan_document(bundle: Path, planned: Sequence[PlannedEngine]) -> dict[str, Any]:
    """The plan as JSON: every engine with everything that its key is made of, its path and its reason."""
    return {
        "bundle": str(bundle),
        "engines": [
            {
                **dataclasses.asdict(engine.spec),
                "key": engine.spec.key,
                "path": engine.spec.path,
                "profile": engine.profile,
                "reason": engine.reason,
                "exists": engine.exists,
                "supersedes": [entry.file.path for entry in engine.superseded],
            }
            for engine in planned
        ],
    }


def _plan_text(bundle: Path, planned: Sequence[PlannedEngine]) -> str:
    rows = [(engine.spec.graph, engine.spec.key[:KEY_CHARACTERS], engine.reason) for engine in planned]
    missing = sum(not engine.exists for engine in planned)
    return "\n".join(
        [f"{bundle}: {plural(missing, 'engine')} of {len(planned)} to build", table(rows, ("graph", "key", "reason"), "  ")]
    )


VERB = Verb(
    name="build",
    summary="build the TensorRT or TensorRT-RTX engines of a bundle",
    description="Builds the engines of a bundle that are missing or stale. Building TensorRT-RTX engines requires no GPU.",
    example="sana-export build bundle --backend tensorrt-rtx --profile laptop --compute-capability 8.9",
    add_arguments=add_arguments,
    run=run,
    level=VERBOSE,
)
