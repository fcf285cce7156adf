"""`sana-export inspect`: shows what is in a bundle and which engines run on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sana_export.cli.bundle_text import (
    bundle_document,
    bundle_origin,
    graphs_table,
    memory_document,
    memory_needs,
    memory_text,
    peak,
    served,
    target,
    total_bytes,
)
from sana_export.cli.terminal.console import Console
from sana_export.cli.terminal.text import seconds, size, table
from sana_export.cli.verb import Answer, Verb, add_bundle_to_read, add_hub_options, bundle_to_read
from sana_export.commands import first_engines_command, repair_command
from sana_export.errors import ArtifactError
from sana_export.files import FileEntry
from sana_export.known_files import check_known_files, hash_always
from sana_export.machine import gpu_memory_bytes
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import describe_range
from sana_export.trt.compatibility import Host, detect_host, incompatibilities
from sana_export.trt.selection import not_downloaded


@dataclass(frozen=True)
class EngineState:
    """An engine and whether it runs on this machine."""

    #: Its entry in the manifest.
    engine: EngineEntry
    #: What is wrong with its file; None if nothing is.
    damage: str | None
    #: Every reason why it does not run on this machine.
    reasons: tuple[str, ...]

    @property
    def runs_here(self) -> bool:
        """Whether its file is intact and this machine can run it."""
        return self.damage is None and not self.reasons


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_to_read(parser)
    add_hub_options(parser)


def run(options: argparse.Namespace, console: Console) -> Answer:
    bundle = bundle_to_read(options)
    manifest = Manifest.load(bundle)
    files = [*manifest.files, *(file for graph in manifest.graphs.values() for file in graph.files)]
    damaged = damaged_files(bundle, files)
    host = detect_host()
    engines = engine_states(bundle, manifest.engines, host)
    memory = memory_needs(bundle, manifest)
    document = {
        **bundle_document(bundle, manifest),
        "damaged": damaged,
        "runs_here": {"onnx": not damaged, "engines": any(state.runs_here for state in engines)},
        "engines": [
            {
                **dataclasses.asdict(state.engine),
                "damaged": state.damage,
                "runs_here": state.runs_here,
                "reasons": list(state.reasons),
            }
            for state in engines
        ],
        "memory": memory_document(memory),
        "parity": manifest.parity,
    }
    anything_damaged = damaged or any(state.damage for state in engines)
    text = _text(bundle, manifest, damaged, engines, memory_text(memory, gpu_memory_bytes(host.gpus)))
    return Answer(document, text, ArtifactError.exit_code if anything_damaged else 0)


def damaged_files(bundle: Path, files: Iterable[FileEntry]) -> dict[str, str]:
    """Path to what is wrong, for those of `files` that are missing, changed or outside the bundle."""
    damaged = {}
    for file in {file.path: file for file in files}.values():
        try:
            with hash_always():
                check_known_files(bundle, [file], fix="")
        except ArtifactError as error:
            damaged[file.path] = f"{error.message}: {error.found}, wanted {error.wanted}"
    return damaged


def engine_states(bundle: Path, engines: Iterable[EngineEntry], host: Host) -> list[EngineState]:
    """The state of each engine on `host`."""
    states = []
    for engine in engines:
        absent = not_downloaded(bundle, [engine]).get(engine.key, [])
        damage = None if absent else damaged_files(bundle, [engine.file]).get(engine.file.path)
        states.append(EngineState(engine, damage, (*incompatibilities(engine, host), *absent)))
    return states


def _text(bundle: Path, manifest: Manifest, damaged: dict[str, str], engines: Sequence[EngineState], memory: str) -> str:
    parts = [
        f"{bundle}: {size(total_bytes(manifest))}, written by sana-export {manifest.tool_version}",
        bundle_origin(manifest),
        graphs_table(manifest),
    ]
    parts.append("files: all match the manifest" if not damaged else "files: DAMAGED")
    parts += [f"  {text}" for text in damaged.values()]
    parts += [f"  fix: {repair_command(bundle, manifest)}"] if damaged else []
    parts.append(_engines_text(engines) if engines else f"engines: none; to build some: {first_engines_command(bundle, manifest)}")
    parts += [memory] if memory else []
    if manifest.parity is not None:
        parts.append(f"parity: {_verdict(manifest.parity.get('passed'))} at the last verification")
    return "\n".join(parts)


def _engines_text(engines: Sequence[EngineState]) -> str:
    rows = [
        (
            state.engine.graph,
            f"{state.engine.backend} {state.engine.backend_version}",
            target(state.engine),
            served(state.engine),
            size(state.engine.file.bytes),
            seconds(state.engine.build_seconds),
            peak(state.engine.build_peak_bytes),
            "yes" if state.runs_here else "no",
        )
        for state in engines
    ]
    parts = [table(rows, ("engine", "backend", "target", "profile", "size", "built in", "peak memory", "runs here"), "  ")]
    reasons: dict[str, list[str]] = {}
    for state in engines:
        for reason in [state.damage] if state.damage else state.reasons:
            reasons.setdefault(reason, []).append(state.engine.graph)
    parts += [f"  cannot run: {reason} ({len(graphs)} of {len(engines)} engines)" for reason, graphs in reasons.items()]
    parts += [f"  profile {name}: {shapes}" for name, shapes in _profiles(engines).items()]
    return "engines:\n" + "\n".join(parts)


def _profiles(engines: Sequence[EngineState]) -> dict[str, str]:
    """Profile to the ranges of batch and latent size (in latent pixels) of its engines."""
    shown = ("batch", "latent_height", "latent_width")
    profiles: dict[str, dict[str, str]] = {}
    for state in engines:
        axes = profiles.setdefault(state.engine.profile, {})
        axes |= {axis: describe_range(values) for axis, values in state.engine.ranges.items() if axis in shown}
    return {name: ", ".join(f"{axis} {axes[axis]}" for axis in shown if axis in axes) for name, axes in profiles.items()}


def _verdict(passed: object) -> str:
    return "within the limits" if passed else "LIMITS MISSED"


VERB = Verb(
    name="inspect",
    summary="show what is in a bundle and which engines run on this machine",
    description="Shows what is in a bundle, checks every file against the manifest, and shows which engines run on this machine.",
    example="sana-export inspect bundle --json",
    add_arguments=add_arguments,
    run=run,
)
