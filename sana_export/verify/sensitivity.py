"""`verify --sensitivity`: each layer of a graph quantized alone, and how much that changes the graph's outputs.

The graph runs in torch in float32 on inputs that runs of the runtime gave it. One layer at a time gets the numbers of its rounded
weights, and rounds its inputs if the scheme does; then the layer is as it was. So the damage of a layer is not hidden by that of
others, and the layers that the table of quantization.py leaves in 16 bits are measured like all others.

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
from sana_export.export.quantize.statistics import LayerInputs
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import as_stored, as_used
from sana_export.graphs.builders import build_graph
from sana_export.graphs.numerics import Linear
from sana_export.graphs.products import ProductForm, QuantizedProducts
from sana_export.graphs.storage import WeightFile, stored_in
from sana_export.manifest import Manifest, QuantizedWeight
from sana_export.progress import OnProgress, Progress, ignore_progress
from sana_export.quantization import AVAILABLE, LAYERS, SCHEMES, Scheme, layer_rule, part_of
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
    """Quantize each layer of each graph alone, with each scheme, and compare the graph's outputs with those of the whole graph.

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
            fix=export_command(bundle.with_name(f"{bundle.name}-whole"), manifest, quantize={}),
        )
    for name in check.schemes:
        if name not in AVAILABLE:
            raise UsageError("unknown quantization scheme", found=f"--scheme {name}", wanted=", ".join(AVAILABLE))
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
        parameter, rule = self._weights[name], layer_rule(part_of(self._graph), name)
        whole = parameter.data
        parameter.data, form = self._quantized(name, scheme)
        try:
            with QuantizedProducts(self._module, {} if form is None else {name: form}):
                error = _relative_error(self._outputs(), self._wanted)
        finally:
            parameter.data = whole
        return LayerDamage(self._graph, name, tuple(whole.shape), scheme.name, error, form is not None, rule.bits, rule.inputs)

    def _quantized(self, name: str, scheme: Scheme) -> tuple[Tensor, ProductForm | None]:
        """The layer's numbers as `scheme` stores them, and how it computes if its inputs are rounded."""
        parameter = self._weights[name]
        linear = isinstance(self._module.get_submodule(name.rpartition(".")[0]), Linear)
        matrix = as_stored(parameter.data.numpy(), not linear)
        block = 0 if not scheme.block or len(matrix) % scheme.block else scheme.block
        inputs = self._inputs(name, len(matrix)) if scheme.inputs else None
        weight = QuantizedWeight(
            name,
            scheme.weights,
            matrix.shape,
            axis=0 if block else 1,
            block=block,
            inputs=scheme.inputs if inputs else "",
            rescaled=scheme.method.rescale and inputs is not None,
        )
        layer = quantize_layers({name: matrix}, {name: weight}, scheme.method, inputs, self._dtype)[name]
        numbers = torch.from_numpy(as_used(layer.rounded.numbers, not linear, tuple(parameter.shape)))
        if layer.input_scale is None:
            return numbers, None
        factor = None if layer.factor is None else torch.from_numpy(layer.factor)
        return numbers, ProductForm(scheme.inputs, layer.input_scale, factor)

    def _inputs(self, name: str, rows: int) -> LayerInputs | None:
        """What the layer reads. None if it is no product over all channels, such as a depthwise convolution."""
        sample = self._seen.samples[self._seen.owners[name]]
        return None if rows % len(sample.maximum) else LayerInputs(0, sample.maximum, sample.rows)

    @torch.no_grad()
    def _outputs(self) -> list[tuple[Tensor, ...]]:
        """The outputs of each run."""
        found = [self._module(**inputs) for inputs in self._runs]
        return [outputs if isinstance(outputs, tuple) else (outputs,) for outputs in found]


def _relative_error(found: Sequence[tuple[Tensor, ...]], wanted: Sequence[tuple[Tensor, ...]]) -> float:
    """The root of the sum of squared differences over that of the squares of `wanted`, over all outputs of all runs."""
    difference = total = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            difference += float((one.double() - other.double()).square().sum())
            total += float(other.double().square().sum())
    return math.sqrt(difference / total) if total else math.inf
