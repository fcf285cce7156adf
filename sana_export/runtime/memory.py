"""What a bundle's engines need of a GPU's memory, known from the manifest before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sana_export.contract import GraphSpec
from sana_export.errors import DependencyError
from sana_export.manifest import EngineEntry, Manifest

AUTO = "auto"
#: Where the graphs of a runtime are: resident, all at once; staged, those of one stage at a time (text, denoising, decoding);
#: streaming, staged with weights that stay on the host and come as they are needed. "auto" takes the first that fits.
MEMORY_MODES = (AUTO, "resident", "staged", "streaming")

#: The graphs of a stage are loaded together if memory is short; stages in the order in which they run.
TEXT_STAGE, DENOISING_STAGE = ("text_encoder", "context"), ("denoiser", "sampler")
STAGES = (TEXT_STAGE, DENOISING_STAGE, ("vae_decoder", "vae_decoder_head", "vae_decoder_tail", "postprocess"))
#: The graphs that every image needs. Which ones decode it depends on its size.
SAMPLING_GRAPHS = (*TEXT_STAGE, *DENOISING_STAGE, "postprocess")
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


@dataclass(frozen=True)
class MemoryRequirement:
    """Bytes of GPU memory. `weights`: of the engines; `work`: what the largest works in, at the largest shapes of its profile;
    `tensors`: inputs and outputs of the graph that has the most of them there. CUDA's own, a few hundred MB, comes on top."""

    weights: int
    work: int
    tensors: int

    @property
    def total(self) -> int:
        return self.weights + self.work + self.tensors


def memory_requirements(manifest: Manifest, engines: Mapping[str, EngineEntry]) -> dict[str, MemoryRequirement]:
    """Memory mode to what it needs at the most with these engines, one for each graph."""
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


def choose_memory_mode(mode: str, wanted: Mapping[str, MemoryRequirement], free: int, bundle: object) -> tuple[str, str | None]:
    """The mode to run in where `mode` is asked for and `free` bytes are free, and a warning where it may be too little.

    "auto" takes the first mode that fits. A mode whose weights alone are too large raises DependencyError with the mode that fits,
    or the way to smaller engines. The rest of a need is its upper bound, so that it alone refuses nothing.
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
            f"{gigabytes(free)} of GPU memory are free, and up to {gigabytes(need.total)} may be needed for the largest images of"
            f" this profile (memory mode {mode})"
        )
    better = [f"--memory {name}" for name, other in wanted.items() if other.weights < free]
    raise DependencyError(
        "there is too little GPU memory for this bundle" if need else "no engine of this bundle can stream its weights",
        found=f"{gigabytes(free)} free",
        wanted="; ".join(
            f"{name}: {gigabytes(other.weights)} of weights, {gigabytes(other.total)} at the most" for name, other in wanted.items()
        ),
        fix=better[0] if better else f"sana-export build {bundle} --backend BACKEND --profile static --weight-streaming",
    )


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _requirement(
    manifest: Manifest, entries: Iterable[EngineEntry], held: Iterable[EngineEntry] | None = None
) -> MemoryRequirement:
    """Of `entries` together; `held` are those whose weights are on the device all the time (None: all)."""
    entries = tuple(entries)
    weights = sum(_weight_bytes(manifest, entry) for entry in (entries if held is None else held))
    work = max(entry.activation_bytes for entry in entries)
    return MemoryRequirement(weights, work, max(_tensor_bytes(manifest.graphs[entry.graph].spec, entry) for entry in entries))


def _weight_bytes(manifest: Manifest, entry: EngineEntry) -> int:
    """The engine's file, and for a refittable one the weights that it is given when it is loaded."""
    return entry.file.bytes + (sum(file.bytes for file in manifest.graphs[entry.graph].data) if entry.refittable else 0)


def _tensor_bytes(spec: GraphSpec, entry: EngineEntry) -> int:
    """Of the graph's inputs and outputs at the largest shapes of the engine. Axes of outputs alone follow from the inputs'."""
    total = 0
    for tensor in (*spec.inputs, *spec.outputs):
        lengths = [
            axis if isinstance(axis, int) else entry.ranges[axis][2]
            for axis in tensor.shape
            if axis in entry.ranges or isinstance(axis, int)
        ]
        total += math.prod(lengths) * DTYPE_BYTES[tensor.dtype]
    return total
