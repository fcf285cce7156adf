"""`verify --polygraphy`: a bundle's graphs with inputs and outputs for Polygraphy's own commands, and scripts of these commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sana_export.errors import UsageError
from sana_export.export.evaluator import TensorEvaluator
from sana_export.files import locked
from sana_export.formats.arrays import Array
from sana_export.manifest import Manifest, ModelInfo
from sana_export.output_folder import OutputFolder
from sana_export.profiles import Profile, profile_named
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.quantization.targets import NO_KERNELS
from sana_export.trt.build import input_shapes
from sana_export.trt.bundle import read_instruction_tokens
from sana_export.trt.plan import profile_ranges
from sana_export.user_paths import user_path
from sana_export.verify.bundle import Sampling
from sana_export.verify.graph_file import open_graph
from sana_export.verify.layers import snr_limit
from sana_export.verify.polygraphy_package import comparator, save_inputs, save_outputs
from sana_export.verify.polygraphy_scripts import INPUTS, OUTPUTS, GraphCommands, scripts
from sana_export.verify.recorded_inputs import DEFAULT_SAMPLING, record_inputs

#: The file that says what is in the folder.
CONTENT = "polygraphy.json"
_OPTION = "--polygraphy"


@dataclass(frozen=True)
class PolygraphyFiles:
    """What was written."""

    #: The folder.
    folder: str
    #: The bundle's folder.
    bundle: str
    #: Where the inputs come from.
    inputs: str
    #: The profile of the engines that the scripts build.
    profile: str
    #: The graphs, each of which has a folder.
    graphs: tuple[str, ...]
    #: The scripts.
    scripts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        versions = {name: version(name) for name in ("polygraphy", "onnxruntime", "onnx")}
        return {**vars(self), "graphs": list(self.graphs), "scripts": list(self.scripts), "versions": versions}

    def as_text(self) -> str:
        lines = [f"{self.folder}: inputs and outputs of {len(self.graphs)} graphs of {self.bundle}", f"  inputs:  {self.inputs}"]
        lines += [f"  graphs:  {', '.join(self.graphs)}", f"  scripts: {', '.join(self.scripts)}"]
        return "\n".join(lines)


def write_polygraphy_files(
    bundle: Path,
    folder: Path,
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    step: int = 1,
    profile: str = "default",
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> PolygraphyFiles:
    """Write the folder, whole or not at all. It replaces a folder that was written in the same way.

    Each graph gets the inputs that a run of the first prompt gives it, and the outputs that float32 arithmetic computes from them.
    The scripts build engines for `profile`. Raises UsageError if the folder has other files in it or the profile does not cover the
    inputs, DependencyError if Polygraphy is missing, and what `record_inputs` raises.
    """
    comparator()  # before the long work
    bundle = user_path(bundle, "the bundle")
    place = OutputFolder.of(user_path(folder, _OPTION))
    place.check_replaceable(CONTENT, "files for Polygraphy", _OPTION)
    manifest = Manifest.load(bundle)
    chosen = profile_named(profile)
    ranges = profile_ranges(manifest, chosen, read_instruction_tokens(bundle))
    on_progress(Progress("recording the inputs", 0, len(manifest.graphs) + 1))
    inputs = record_inputs(bundle, manifest.graphs, sampling, step=step, threads=threads)
    shapes = {graph: input_shapes(entry.spec, ranges) for graph, entry in manifest.graphs.items()}
    for graph, feeds in inputs.items():
        _check_covered(graph, feeds, shapes[graph], chosen, manifest.model)
    with locked(place.lock, remove=True), place.written(last=CONTENT) as partial:
        commands = []
        for done, (graph, entry) in enumerate(manifest.graphs.items(), 1):
            on_progress(Progress(graph, done, len(manifest.graphs) + 1))
            path = open_graph(bundle, graph).path
            names = [tensor.name for tensor in entry.spec.outputs]
            outputs = TensorEvaluator(path, names, threads, arithmetic="float32").run(inputs[graph])
            (partial / graph).mkdir()
            save_inputs(partial / graph / INPUTS, entry.spec, inputs[graph])
            save_outputs(partial / graph / OUTPUTS, "float32", outputs)
            engines = {engine.backend: engine.file.path for engine in manifest.engines if engine.graph == graph}
            own = {name: tuple(map(int, value.shape)) for name, value in inputs[graph].items() if name in shapes[graph]}
            kernels = not any(weight.dtype == NO_KERNELS for weight in entry.quantized)
            commands.append(GraphCommands(graph, entry.onnx.path, own, shapes[graph], engines, kernels))
        texts = scripts(bundle.resolve(), commands, snr_limit(manifest.options.precision), manifest.options.dtype)
        for name, text in texts.items():
            (partial / name).write_text(text, "utf-8", newline="")
        source = f"the prompt {sampling.prompts[0]!r}, step {step}"
        written = PolygraphyFiles(str(folder), str(bundle), source, profile, tuple(manifest.graphs), tuple(texts))
        (partial / CONTENT).write_text(json.dumps(written.as_json(), indent=1), "utf-8")
    return written


def _check_covered(graph: str, feeds: Mapping[str, Array], shapes: Mapping[str, Any], profile: Profile, model: ModelInfo) -> None:
    """Raise UsageError if an input's shape is outside the profile."""
    for name, (lowest, _, highest) in shapes.items():
        found = feeds[name].shape
        if not all(low <= size <= high for low, size, high in zip(lowest, found, highest, strict=True)):
            height, width = profile.covered(model)[0]
            raise UsageError(
                f"the profile {profile.name} does not cover the inputs of {graph}",
                found=f"{name} {list(found)}",
                wanted=f"{list(lowest)} to {list(highest)}",
                fix=f"--height {height} --width {width}",
            )
