"""What a bundle's engines will need of a GPU's memory, told from its manifest alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_export.cli.terminal.text import size, table
from sana_export.manifest import Manifest
from sana_export.runtime.memory import MemoryRequirement, memory_requirements
from sana_export.trt.selection import engine_set


def memory_needs(bundle: Path, manifest: Manifest) -> dict[str, Mapping[str, MemoryRequirement]]:
    """Backend to memory mode to its need, with the engines that one image of the native size runs."""
    found: dict[str, Mapping[str, MemoryRequirement]] = {}
    for backend in dict.fromkeys(engine.backend for engine in manifest.engines):
        entries = (engine for engine in manifest.engines if engine.backend == backend)
        found[backend] = memory_requirements(manifest, engine_set(bundle, backend, entries).typical(manifest.model))
    return found


def memory_document(found: Mapping[str, Mapping[str, MemoryRequirement]]) -> dict[str, Any]:
    return {
        backend: {mode: {**dataclasses.asdict(need), "total": need.total} for mode, need in modes.items()}
        for backend, modes in found.items()
    }


def memory_text(found: Mapping[str, Mapping[str, MemoryRequirement]], gpu_bytes: int | None = None) -> str:
    """A row a backend and mode; with `gpu_bytes`, the memory of the GPU here, whether it fits. "" without engines."""
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
    return "GPU memory, at the most:\n" + table(rows, ("engines, mode", "weights", "work", "in all", "fits here"), "  ")
