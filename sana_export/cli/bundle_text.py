"""What is in a bundle and how much GPU memory its engines need, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.terminal.text import plural, seconds, size, table
from sana_export.contract import GRAPHS
from sana_export.lora_scales import scales_text
from sana_export.manifest import EngineEntry, Manifest
from sana_export.quantization.layers import PARTS
from sana_export.runtime.memory import MemoryRequirement, memory_requirements
from sana_export.trt.selection import engine_set


def bundle_document(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest without its tables of tensors, with sizes in bytes."""
    return {
        "bundle": str(bundle),
        "checkpoint": dataclasses.asdict(manifest.checkpoint),
        "options": dataclasses.asdict(manifest.options),
        "native_size": manifest.model.native_size,
        "graphs": {
            name: {
                "bytes": sum(file.bytes for file in graph.files),
                "parameters": graph.parameters,
                "quantized_weights": len(graph.quantized),
                "opset": graph.opset,
                "onnx_sha256": graph.onnx.sha256,
            }
            for name, graph in manifest.graphs.items()
        },
        "engines": [dataclasses.asdict(engine) for engine in manifest.engines],
        "bytes": total_bytes(manifest),
        "export_key": manifest.export_key,
        "tool_version": manifest.tool_version,
    }


def total_bytes(manifest: Manifest) -> int:
    """Bytes of all files in the manifest. A file that several graphs share counts once."""
    files = [*manifest.files, *(file for graph in manifest.graphs.values() for file in graph.files)]
    files += [engine.file for engine in manifest.engines]
    return sum({file.path: file.bytes for file in files}.values())


def bundle_summary(bundle: Path, manifest: Manifest) -> str:
    """The bundle's path and size, its checkpoint, graphs and engines."""
    parts = [f"{bundle}: {size(total_bytes(manifest))}", bundle_origin(manifest), graphs_table(manifest)]
    if manifest.engines:
        parts.append(engines_table(manifest.engines))
    return "\n".join(parts)


def bundle_origin(manifest: Manifest) -> str:
    """One line: the checkpoint and the options of the export."""
    checkpoint, options = manifest.checkpoint, manifest.options
    facts = [checkpoint.source + (f" at {checkpoint.revision}" if checkpoint.revision else "")]
    facts += [f"transformer from {checkpoint.transformer.path}"] if checkpoint.transformer else []
    facts += [f"autoencoder {checkpoint.vae.path}"] if checkpoint.vae else []
    facts += [f"ControlNet {checkpoint.controlnet.path}"] if checkpoint.controlnet else []
    facts += [f"LoRA {lora.path} at {scales_text(lora.scale, lora.layer_scales)}" for lora in checkpoint.loras]
    facts += ["synthetic: random weights"] if checkpoint.synthetic else []
    facts += [options.precision, f"{manifest.model.native_size} px"]
    facts += [str(name)] if (name := manifest.model.scheduler.get("_class_name")) else []
    facts += ["self-attention clamped"] if options.clamp else []
    facts += [f"{part} in {options.quantize[part]}" for part in PARTS if part in options.quantize]
    if options.pag_layers:
        facts.append("PAG in " + ", ".join(f"transformer_blocks.{layer}" for layer in options.pag_layers))
    return ", ".join(facts)


def graphs_table(manifest: Manifest) -> str:
    """One row for each graph. With quantized graphs, a column says how weights are stored."""
    order = [*(name for name in GRAPHS if name in manifest.graphs), *(name for name in manifest.graphs if name not in GRAPHS)]
    rows, options = list[tuple[str, ...]](), manifest.options
    for name in order:
        graph = manifest.graphs[name]
        row = (name, f"{graph.parameters / 1e6:.2f} M", size(sum(file.bytes for file in graph.files)))
        rows.append((*row, options.scheme(name) or options.precision) if options.quantize else row)
    return table(rows, ("graph", "parameters", "size", *(["weights"] if options.quantize else [])), "  ")


def engines_table(engines: tuple[EngineEntry, ...]) -> str:
    """One row for the engines of each backend, target and profile, in the manifest's order."""
    groups: dict[tuple[str, ...], list[EngineEntry]] = {}
    for engine in engines:
        key = (engine.backend, engine.backend_version, target(engine), served(engine))
        groups.setdefault(key, []).append(engine)
    rows = [
        (
            *key,
            plural(len(group), "engine"),
            size(sum(engine.file.bytes for engine in group)),
            seconds(sum(engine.build_seconds for engine in group)),
            peak(max(engine.build_peak_bytes for engine in group)),
        )
        for key, group in groups.items()
    ]
    return table(rows, ("backend", "version", "target", "profile", "engines", "size", "built in", "peak memory"), "  ")


def target(engine: EngineEntry) -> str:
    """The compute capabilities that an engine was built for."""
    return ", ".join(engine.compute_capabilities) or "portable"


def served(engine: EngineEntry) -> str:
    """The profile that an engine was built for, and whether it is refittable."""
    return engine.profile + (", refittable" if engine.refittable else "")


def peak(count: int) -> str:
    """Peak host memory of a build; a dash if it was not measured."""
    return size(count) if count else "-"


def memory_needs(bundle: Path, manifest: Manifest) -> dict[str, Mapping[str, MemoryRequirement]]:
    """What the engines for one image of the native size need, by backend and memory mode."""
    found: dict[str, Mapping[str, MemoryRequirement]] = {}
    for backend in dict.fromkeys(engine.backend for engine in manifest.engines):
        entries = (engine for engine in manifest.engines if engine.backend == backend)
        found[backend] = memory_requirements(manifest, engine_set(bundle, backend, entries).typical(manifest.model))
    return found


def memory_document(found: Mapping[str, Mapping[str, MemoryRequirement]]) -> dict[str, Any]:
    """`memory_needs` as JSON."""
    return {
        backend: {mode: {**dataclasses.asdict(need), "total": need.total} for mode, need in modes.items()}
        for backend, modes in found.items()
    }


def memory_text(found: Mapping[str, Mapping[str, MemoryRequirement]], gpu_bytes: int | None = None) -> str:
    """`memory_needs` as a table that says whether a GPU with `gpu_bytes` of memory is large enough. "" without engines."""
    rows = [
        (
            f"{backend}, {mode}",
            size(need.weights),
            size(need.work),
            size(need.total),
            "-" if gpu_bytes is None else "yes" if need.total <= gpu_bytes else "no",
        )
        for backend, modes in found.items()
        for mode, need in modes.items()
    ]
    if not rows:
        return ""
    return "GPU memory, at most:\n" + table(rows, ("engines, mode", "weights", "work", "total", "fits here"), "  ")
