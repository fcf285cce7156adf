"""Finds the slowest layers of each graph, in the same form for every backend.

A graph runs alone on random inputs of the workload's sizes, after a warm-up. `PROFILERS` has one function for each backend, which
takes a `GraphRun` and returns the time of each layer.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.bench.work.call_shape import CallShape, call_shape
from sana_export.bench.workload import Workload
from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.contract import GraphSpec
from sana_export.errors import UsageError
from sana_export.manifest import Manifest
from sana_export.progress import OnProgress, Progress, ignore_progress


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer."""

    #: The backend's name for it.
    name: str
    #: The backend's name for its type.
    operator: str
    #: Milliseconds in one run of its graph.
    ms: float
    #: Bytes that it reads and writes. None if the backend does not report them.
    bytes: int | None = None

    @property
    def gbs(self) -> float | None:
        return self.bytes / self.ms / 1e6 if self.bytes and self.ms else None


@dataclass(frozen=True, eq=False)
class GraphRun:
    """One graph to profile."""

    #: A key of `PROFILERS`.
    backend: str
    #: Folder of the bundle.
    bundle: Path
    #: The bundle's manifest.
    manifest: Manifest
    #: The checkpoint that the bundle was exported from.
    checkpoint: SanaCheckpoint
    #: Name of the graph.
    graph: str
    #: Its inputs and outputs.
    spec: GraphSpec
    #: Name to input, as PyTorch tensors on the CPU.
    inputs: Mapping[str, Any]
    #: Number of CPU threads.
    threads: int
    #: Number of timed runs.
    runs: int


@dataclass(frozen=True)
class GraphProfile:
    """The profile of one graph."""

    #: Name of the graph.
    graph: str
    #: Number of times that one call runs the graph.
    times: int
    #: Its layers, the slowest first.
    layers: tuple[LayerTime, ...]
    #: Why there are no layers, or None.
    failed: str | None = None

    @property
    def ms(self) -> float:
        return sum(layer.ms for layer in self.layers)

    def operators(self) -> dict[str, float]:
        """Operator to its milliseconds in one run, the slowest first."""
        totals: dict[str, float] = {}
        for layer in self.layers:
            totals[layer.operator] = totals.get(layer.operator, 0.0) + layer.ms
        return dict(sorted(totals.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class BackendProfile:
    """The profile of all graphs on one backend."""

    #: A key of `PROFILERS`.
    backend: str
    #: Name of the workload.
    workload: str
    #: Number of CPU threads.
    threads: int
    #: The profile of each graph.
    graphs: tuple[GraphProfile, ...]

    @property
    def failed(self) -> bool:
        return any(graph.failed for graph in self.graphs)

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "graphs": [{**dataclasses.asdict(graph), "ms": graph.ms, "operators": graph.operators()} for graph in self.graphs],
        }

    def as_text(self, top: int) -> str:
        """Markdown: the `top` slowest layers of each graph, then its operators."""
        lines = [f"# {self.backend}: slowest layers, {self.workload}, {self.threads} threads", ""]
        lines += ["| graph | layer | operator | ms per run | share of the graph | GB/s |", "|---|---|---|---:|---:|---:|"]
        for graph in self.graphs:
            for layer in graph.layers[:top]:
                gbs = "" if layer.gbs is None else f"{layer.gbs:.1f}"
                lines.append(
                    f"| {graph.graph} | {layer.name} | {layer.operator} | {layer.ms:.3f} | {layer.ms / graph.ms:.1%} | {gbs} |"
                )
        lines += ["", "| graph | runs per call | ms per run | operators |", "|---|---:|---:|---|"]
        for graph in self.graphs:
            shares = ", ".join(f"{name} {ms / graph.ms:.0%}" for name, ms in list(graph.operators().items())[:6])
            lines.append(f"| {graph.graph} | {graph.times} | {graph.ms:.3f} | {' '.join((graph.failed or shares).split())} |")
        return "\n".join(lines) + "\n"


#: Backend to "module:function" of the function that takes a GraphRun and returns its layers.
PROFILERS = {
    "onnxruntime": "sana_export.bench.profile.onnxruntime:layers",
    "torch": "sana_export.bench.profile.torch:layers",
    "tensorrt": "sana_export.bench.profile.tensorrt:layers",
    "tensorrt-rtx": "sana_export.bench.profile.tensorrt:layers",
}


def run_profile(
    bundle: Path,
    checkpoint: SanaCheckpoint,
    *,
    backend: str = "onnxruntime",
    workload: Workload,
    graphs: Sequence[str] = (),
    runs: int = 5,
    on_progress: OnProgress = ignore_progress,
) -> BackendProfile:
    """Profile `graphs` of `bundle`, which was exported from `checkpoint`, on `backend`.

    Without `graphs`, profile all that a call of the workload's first prompt runs. If the backend cannot run one, its profile says
    why. Raises UsageError for an unknown backend or graph.
    """
    from sana_export.errors import SanaExportError
    from sana_export.export.example_inputs import graph_spec, random_inputs

    if backend not in PROFILERS:
        near = difflib.get_close_matches(backend, PROFILERS, n=1) or list(PROFILERS)
        raise UsageError(
            f"cannot profile the backend {backend!r}", found=backend, wanted=", ".join(PROFILERS), fix=f"--backend {near[0]}"
        )
    manifest = Manifest.load(bundle)
    shape = call_shape(bundle, manifest, workload, workload.prompts[0])
    counts = _counts(shape)
    if unknown := [name for name in graphs if name not in counts]:
        raise UsageError(
            f"the workload {workload.name} does not run the graph {unknown[0]!r}",
            found=unknown[0],
            wanted=", ".join(counts),
            fix=f"--graphs {next(iter(counts))}",
        )
    module, _, function = PROFILERS[backend].partition(":")
    layers: Callable[[GraphRun], list[LayerTime]] = getattr(importlib.import_module(module), function)
    names, found, threads = list(graphs) or list(counts), [], workload.resolved_threads()
    for done, name in enumerate(names):
        on_progress(Progress(name, done, len(names)))
        spec = graph_spec(name, checkpoint, manifest.options)
        inputs = random_inputs(spec, _sizes(shape, manifest), seed=0)
        try:
            timed = layers(GraphRun(backend, bundle, manifest, checkpoint, name, spec, inputs, threads, runs))
        except SanaExportError as error:
            found.append(GraphProfile(name, counts[name], (), str(error)))
            continue
        found.append(GraphProfile(name, counts[name], tuple(sorted(timed, key=lambda layer: -layer.ms))))
    on_progress(Progress("report", len(names), len(names)))
    return BackendProfile(backend, workload.name, threads, tuple(found))


def _counts(shape: CallShape) -> dict[str, int]:
    """Graph to the number of times that one call runs it."""
    decoder = {"vae_decoder_head": 1, "vae_decoder_tail": len(shape.windows)} if shape.windows else {"vae_decoder": 1}
    before = {"text_encoder": len(shape.encoder_runs), "context": 1, "denoiser": shape.steps, "sampler": shape.steps}
    return {**before, **decoder, "postprocess": 1}


def _sizes(shape: CallShape, manifest: Manifest) -> Any:
    """The sizes of all graphs' inputs."""
    from sana_export.export.example_inputs import Sizes

    _, tokens, prefix = max(shape.encoder_runs, default=(1, 1, 1))
    tile = max(shape.windows, default=(1, 1))
    stride = manifest.model.vae_scale_factor
    return Sizes(
        batch=shape.batch,
        branches=shape.branches,
        text_branches=shape.text_branches,
        tokens=tokens,
        prefix_tokens=prefix,
        text_tokens=shape.text_tokens,
        latent_height=shape.latent_height,
        latent_width=shape.latent_width,
        feature_height=shape.features[0],
        feature_width=shape.features[1],
        tile_height=tile[0],
        tile_width=tile[1],
        output_height=shape.latent_height * stride,
        output_width=shape.latent_width * stride,
        spatial_ratio=stride,
    )
