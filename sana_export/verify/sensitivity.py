"""`verify --sensitivity`: each layer of a graph quantized alone, and how much that changes the graph's outputs.

The graph runs in torch in float32 on inputs that runs of the runtime gave it. One layer at a time gets the numbers of its rounded
weights, and rounds its inputs if the scheme does; then the layer is as it was. So the damage of a layer is not hidden by that of
others, and the layers that quantization/layers.py leaves in 16 bits are measured like all others.

Memory is bounded: the weights lie in a temporary file, and one layer at a time is in memory twice.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sana_export.calibration.observer import GraphInputs, ObservedProducts
from sana_export.commands import export_command
from sana_export.errors import UsageError
from sana_export.export.quantize.layers import quantize_layers
from sana_export.export.quantize.plan import layer_layout
from sana_export.export.quantize.statistics import LayerInputs
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import as_stored, as_used
from sana_export.graphs.builders import build_graph
from sana_export.graphs.numerics import Linear
from sana_export.graphs.products import ProductForm, QuantizedProducts
from sana_export.graphs.storage import WeightFile, stored_in
from sana_export.manifest import Manifest
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.quantization.layers import LAYERS, layer_rule, layer_scheme, part_of
from sana_export.quantization.schemes import SCHEMES, Scheme
from sana_export.runtime.backends.torch import cpu_threads, exact_products, reopen
from sana_export.user_paths import user_path
from sana_export.verify.bundle import STEPS, Sampling
from sana_export.verify.recorded_inputs import DEFAULT_SAMPLING, STEP_GRAPHS, record_inputs
from sana_export.verify.sensitivity_report import LayerDamage, SensitivityReport

#: The graphs that are measured if none is named, where the bundle has them.
GRAPHS = ("text_encoder", "context", "denoiser", "vae_decoder")
#: Rows of each layer's inputs that ranges are chosen from.
ROWS = 256

#: The inputs of a graph in one run, by name.
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class SensitivityCheck:
    """What to measure."""

    #: Graphs of the bundle. Empty: those of `GRAPHS` that it has.
    graphs: tuple[str, ...] = ()
    #: Names of schemes.
    schemes: tuple[str, ...] = ("int8-weight", "int4-weight")


def measure_sensitivity(
    bundle: Path,
    check: SensitivityCheck = SensitivityCheck(),
    sampling: Sampling = DEFAULT_SAMPLING,
    *,
    threads: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> SensitivityReport:
    """Quantize each layer of each graph alone, with each scheme, and compare the outputs with those of the unquantized graph.

    Every prompt of `sampling` gives one set of inputs. For a graph of the loop they come from steps that are spread over the run.
    Raises UsageError for a quantized bundle, for a graph without layers and for an unknown scheme, ArtifactError if the checkpoint
    is gone, and what `record_inputs` raises.
    """
    bundle = user_path(bundle, "the bundle")
    manifest = Manifest.load(bundle)
    graphs = _choose_graphs(bundle, manifest, check)
    # The runtime does not encode an empty prompt again.
    sampling = replace(sampling, prompts=[prompt for prompt in sampling.prompts if prompt.strip()] or sampling.prompts)
    checkpoint = reopen(bundle, manifest)
    options = replace(manifest.options, precision="fp32")
    schemes = [SCHEMES[name] for name in check.schemes]
    rows: list[LayerDamage] = []
    for graph in graphs:
        on_progress(Progress(f"recording the inputs of {graph}", 0, 1))
        runs = [*_recorded(bundle, manifest, graph, sampling, threads)]
        with (
            tempfile.TemporaryDirectory(prefix="sana-export-sensitivity-", ignore_cleanup_errors=True) as folder,
            WeightFile(Path(folder) / "weights") as file,
        ):
            with stored_in(file):
                module = build_graph(graph, checkpoint, options)
            with exact_products(), cpu_threads(threads):
                for row in GraphLayers(module, graph, runs, manifest.options.dtype).measure(schemes, on_progress):
                    rows.append(row)
                    file.release()
    return SensitivityReport(str(bundle), manifest.options.precision, tuple(sampling.prompts), tuple(rows))


def _choose_graphs(bundle: Path, manifest: Manifest, check: SensitivityCheck) -> list[str]:
    """Raises UsageError if the bundle is quantized already, a graph is missing or has no layers, or a scheme is unknown."""
    if manifest.options.quantize:
        raise UsageError(
            "--sensitivity measures layers that are not quantized",
            found=f"{bundle}, which is quantized already",
            wanted="a bundle without quantized layers",
            fix=export_command(bundle.with_name(f"{bundle.name}-unquantized"), manifest, quantize={}),
        )
    for name in check.schemes:
        if name not in SCHEMES:
            raise UsageError("unknown quantization scheme", found=f"--scheme {name}", wanted=", ".join(SCHEMES))
    present = [graph for graph in manifest.graphs if part_of(graph) in LAYERS]
    if unknown := [graph for graph in check.graphs if graph not in present]:
        raise UsageError(f"{unknown[0]!r} has no layers to quantize", found=f"--graphs {unknown[0]}", wanted=", ".join(present))
    return [*check.graphs] or [graph for graph in GRAPHS if graph in present]


def _recorded(bundle: Path, manifest: Manifest, graph: str, sampling: Sampling, threads: int | None) -> Iterator[Inputs]:
    """The inputs of a run for each prompt, in a loop of the first step for the first prompt, of the last one for the last."""
    steps, last = sampling.steps or min(STEPS, manifest.model.default_steps), max(len(sampling.prompts) - 1, 1)
    for index, prompt in enumerate(sampling.prompts):
        step = 1 + (steps - 1) * index // last if graph in STEP_GRAPHS else 1
        feeds = record_inputs(bundle, [graph], replace(sampling, prompts=[prompt]), step=step, threads=threads)[graph]
        wide = {name: torch.from_numpy(value) for name, value in feeds.items()}
        yield {name: value.float() if value.is_floating_point() else value for name, value in wide.items()}


class GraphLayers:
    """The layers of a graph: its weights that products or convolutions read. They are quantized one at a time.

    `runs` are inputs of the graph. `dtype` is what the bundle stores scales in (formats/dtypes.py).
    """

    def __init__(self, module: nn.Module, graph: str, runs: Sequence[Inputs], dtype: str) -> None:
        self._module, self._graph, self._runs, self._dtype = module, graph, runs, WEIGHT_DTYPES[dtype]
        matrices = {name: value for name, value in module.named_parameters() if value.dim() in (2, 4)}
        self._seen = GraphInputs(ROWS)
        with ObservedProducts(matrices, self._seen):
            self._wanted = self._outputs()
        self._weights = {name: value for name, value in matrices.items() if name in self._seen.owners}

    def measure(self, schemes: Sequence[Scheme], on_progress: OnProgress = ignore_progress) -> Iterator[LayerDamage]:
        """One row for each layer and scheme."""
        work = [(name, scheme) for name in self._weights for scheme in schemes]
        for done, (name, scheme) in enumerate(work):
            on_progress(Progress(f"{self._graph}: {name} in {scheme.name}", done, len(work)))
            yield self._damage(name, scheme)

    def _damage(self, name: str, scheme: Scheme) -> LayerDamage:
        parameter, part = self._weights[name], part_of(self._graph)
        original = parameter.data
        matrix = as_stored(original.numpy(), not self._linear(name))
        parameter.data, form = self._quantized(name, matrix, scheme)
        try:
            with QuantizedProducts(self._module, {name: form}):
                error = _relative_error(self._outputs(), self._wanted)
        finally:
            parameter.data = original
        taken = layer_scheme(part, layer_rule(part, name), scheme, len(matrix)) is scheme
        return LayerDamage(self._graph, name, tuple(original.shape), scheme.name, error, bool(form.inputs), taken)

    def _quantized(self, name: str, matrix: Float32, scheme: Scheme) -> tuple[Tensor, ProductForm]:
        """The layer's numbers as `scheme` stores them, and how it computes. `matrix` is its weight as [in, out]."""
        parameter, linear = self._weights[name], self._linear(name)
        sample = self._seen.samples[self._seen.owners[name]]
        scheme = _fitting(scheme, len(matrix), len(sample.maximum))
        inputs = LayerInputs(0, sample.maximum, sample.rows) if scheme.inputs else None
        weight = layer_layout(name, parameter, scheme, linear, scheme.method)
        layer = quantize_layers({name: matrix}, {name: weight}, scheme.method, inputs, self._dtype)[name]
        numbers = torch.from_numpy(as_used(layer.rounded.numbers, not linear, tuple(parameter.shape)))
        factor = None if layer.factor is None else torch.from_numpy(layer.factor)
        branch = () if layer.branch is None else map(torch.from_numpy, layer.branch)
        return numbers, ProductForm(weight.inputs, layer.input_scale or 1.0, factor, *branch)

    def _linear(self, name: str) -> bool:
        return isinstance(self._module.get_submodule(name.rpartition(".")[0]), Linear)

    @torch.no_grad()
    def _outputs(self) -> list[tuple[Tensor, ...]]:
        """The outputs of each run."""
        found = [self._module(**inputs) for inputs in self._runs]
        return [outputs if isinstance(outputs, tuple) else (outputs,) for outputs in found]


def _fitting(scheme: Scheme, inputs: int, channels: int) -> Scheme:
    """What a layer takes of `scheme`, with so many inputs of each output, from pixels or rows with so many channels.

    The inputs of a depthwise convolution are fewer than the channels, those of a 3x3 convolution more.
    """
    method = scheme.method if inputs == channels else replace(scheme.method, rank=0)
    block = 0 if scheme.block and inputs % scheme.block else scheme.block
    return replace(scheme, block=block, inputs="" if inputs % channels else scheme.inputs, method=method)


def _relative_error(found: Sequence[tuple[Tensor, ...]], wanted: Sequence[tuple[Tensor, ...]]) -> float:
    """The root of the sum of squared differences over that of the squares of `wanted`, over all outputs of all runs."""
    difference = total = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            difference += float((one.double() - other.double()).square().sum())
            total += float(other.double().square().sum())
    return math.sqrt(difference / total) if total else math.inf
