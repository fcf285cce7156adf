"""The GPU memory that a bundle's engines need, computed from the manifest before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sana_export.commands import engines_command
from sana_export.contract import GraphSpec
from sana_export.errors import DependencyError
from sana_export.formats.dtypes import DTYPES
from sana_export.manifest import EngineEntry, Manifest

AUTO = "auto"
#: Which graphs a runtime keeps in memory. resident: all of them. staged: those of one stage at a time (text, denoising,
#: decoding). streaming: as staged, with weights that stay in host memory and are copied as they are needed. "auto" chooses the
#: first that fits.
MEMORY_MODES = (AUTO, "resident", "staged", "streaming")

#: The graphs of each stage, in the order of the stages. In staged mode, those of one stage are loaded together.
TEXT_STAGE, DENOISING_STAGE = ("text_encoder", "context"), ("denoiser", "sampler")
STAGES = (
    (*TEXT_STAGE, "controlnet_context"),
    ("vae_encoder", "vae_encoder_head", "vae_encoder_tail"),
    (*DENOISING_STAGE, "blend", "controlnet"),
    ("vae_decoder", "vae_decoder_head", "vae_decoder_tail", "postprocess"),
)
#: The graphs that every image needs. Which ones decode it depends on its size.
SAMPLING_GRAPHS = (*TEXT_STAGE, *DENOISING_STAGE, "postprocess")


@dataclass(frozen=True)
class MemoryRequirement:
    """Bytes of GPU memory. CUDA itself needs a few hundred MB more."""

    #: The weights of all engines.
    weights: int
    #: The activations of the engine that needs the most, at the largest shapes of its profile.
    work: int
    #: The inputs and outputs of the graph that has the most, at the largest shapes.
    tensors: int

    @property
    def total(self) -> int:
        """All of it: the upper bound of what is needed."""
        return self.weights + self.work + self.tensors


def memory_requirements(manifest: Manifest, engines: Mapping[str, EngineEntry]) -> dict[str, MemoryRequirement]:
    """The most that each memory mode needs with `engines`, one for each graph. Streaming is there if an engine can do it."""
    stages = [[engines[graph] for graph in stage if graph in engines] for stage in STAGES]
    staged = max((_requirement(manifest, stage) for stage in stages if stage), key=lambda need: need.total)
    found = {"resident": _requirement(manifest, engines.values()), "staged": staged}
    streamed = [
        _requirement(manifest, stage, [entry for entry in stage if not entry.options.get("weight_streaming")])
        for stage in stages
        if stage
    ]
    if any(entry.options.get("weight_streaming") for entry in engines.values()):
        found["streaming"] = max(streamed, key=lambda need: need.total)
    return found


def choose_memory_mode(
    mode: str, wanted: Mapping[str, MemoryRequirement], free: int, bundle: Path, backend: str
) -> tuple[str, str | None]:
    """The mode to run in if the user asked for `mode` and `free` bytes are free, and a warning if they may not be enough.

    "auto" chooses the first mode that fits. Raises DependencyError if the weights alone are too large; the error names a mode that
    fits, or the command that builds engines of `backend` that need less. The total is an upper bound, so a mode whose total is too
    large is allowed.
    """
    if mode == AUTO:
        fits = [name for name, need in wanted.items() if need.total <= free]
        possible = [name for name, need in wanted.items() if need.weights < free]
        mode = (fits or possible or ["staged"])[0 if fits else -1]
    need = wanted.get(mode)
    if need is not None and need.total <= free:
        return mode, None
    if need is not None and need.weights < free:
        return mode, (
            f"{gigabytes(free)} of GPU memory are free, but the largest images of this profile may need up to"
            f" {gigabytes(need.total)} (memory mode {mode})"
        )
    better = [f"--memory {name}" for name, other in wanted.items() if other.weights < free]
    raise DependencyError(
        "there is too little GPU memory for this bundle" if need else "no engine of this bundle can stream its weights",
        found=f"{gigabytes(free)} free",
        wanted="; ".join(
            f"{name}: {gigabytes(other.weights)} for weights, up to {gigabytes(other.total)} in all"
            for name, other in wanted.items()
        ),
        fix=better[0] if better else engines_command(bundle, backend, "--profile", "static", "--weight-streaming"),
    )


def gigabytes(count: int) -> str:
    """`count` bytes as text in GB."""
    return f"{count / 1e9:.2f} GB"


def _requirement(
    manifest: Manifest, entries: Iterable[EngineEntry], resident: Iterable[EngineEntry] | None = None
) -> MemoryRequirement:
    """What `entries` need together. `resident` are those whose weights stay on the device. If it is None, all do."""
    entries = tuple(entries)
    weights = sum(_weight_bytes(manifest, entry) for entry in (entries if resident is None else resident))
    work = max(entry.activation_bytes for entry in entries)
    return MemoryRequirement(weights, work, max(_tensor_bytes(manifest.graphs[entry.graph].spec, entry) for entry in entries))


def _weight_bytes(manifest: Manifest, entry: EngineEntry) -> int:
    """The size of the engine's file, and of the weights that a refittable engine gets when it is loaded."""
    return entry.file.bytes + (sum(file.bytes for file in manifest.graphs[entry.graph].data) if entry.refittable else 0)


def _tensor_bytes(spec: GraphSpec, entry: EngineEntry) -> int:
    """The size of the graph's inputs and outputs at the largest shapes of the engine. Axes that only outputs have do not count."""
    total = 0
    for tensor in (*spec.inputs, *spec.outputs):
        lengths = [
            axis if isinstance(axis, int) else entry.ranges[axis][2]
            for axis in tensor.shape
            if axis in entry.ranges or isinstance(axis, int)
        ]
        total += math.prod(lengths) * DTYPES[tensor.dtype].bytes
    return total
