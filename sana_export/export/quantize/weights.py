"""Builds a deployment graph with quantized layers.

The module gets the numbers that its quantized weights stand for, and the layers' forms (graphs/products.py), so it is the
reference for the ONNX file, which stores small numbers and scales. The weight file gets only what the ONNX file reads. What the
module itself needs lies in temporary files beside it, so the weights are never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.export.quantize.folding import weight_before
from sana_export.export.quantize.layers import QuantizedLayer, input_factor, quantize_layers
from sana_export.export.quantize.plan import plan_weights
from sana_export.export.quantize.statistics import CalibrationFile, LayerInputs
from sana_export.formats.arrays import Array, Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import as_stored, as_used, pack
from sana_export.graphs.builders import build_graph
from sana_export.graphs.numerics import Linear
from sana_export.graphs.products import compute_quantized, product_form
from sana_export.graphs.storage import Slice, WeightFile, stored_in
from sana_export.manifest import Options, QuantizedWeight
from sana_export.quantization.choice import method_of
from sana_export.quantization.schemes import SCHEMES


@dataclass(frozen=True)
class StoredWeight:
    """Where the weight file has a quantized weight, and what its layer has besides (records.QuantizedWeight)."""

    weight: QuantizedWeight
    #: Its small numbers, as `formats.quantized.pack` stores them.
    values: Slice
    #: The place and shape of each other tensor of the layer (QuantizedWeight.tensors), by the end of its name, such as "scale".
    tensors: Mapping[str, tuple[Slice, tuple[int, ...]]]


@contextlib.contextmanager
def built(
    name: str, checkpoint: SanaCheckpoint, options: Options, weights: WeightFile, calibration: CalibrationFile | None = None
) -> Iterator[tuple[nn.Module, dict[str, StoredWeight]]]:
    """The graph `name` with its weights in `weights`, and its quantized weights by name.

    The module computes without its layers' forms until `compute_stored` has been called. Use it inside the block only: what it
    reads is deleted then.
    """
    if options.scheme(name) is None:
        with stored_in(weights):
            module = build_graph(name, checkpoint, options)
        yield module, {}
        return
    with (
        tempfile.TemporaryDirectory(prefix="tmp-", dir=weights.path.parent, ignore_cleanup_errors=True) as folder,
        WeightFile(Path(folder) / "rounded") as rounded,
    ):
        with WeightFile(Path(folder) / "whole") as whole:
            with stored_in(whole):
                module = build_graph(name, checkpoint, options)
            stored = _Quantizer(module, name, options, rounded, weights, calibration).run(whole)
        with contextlib.suppress(OSError):  # Windows keeps mapped files
            whole.path.unlink()
        yield module, stored
        rounded.release()


class _Quantizer:
    """Moves the parameters of a module to the file `rounded` if they are quantized, otherwise to `weights`."""

    def __init__(
        self,
        module: nn.Module,
        graph: str,
        options: Options,
        rounded: WeightFile,
        weights: WeightFile,
        calibration: CalibrationFile | None,
    ) -> None:
        self._module, self._graph, self._rounded, self._weights = module, graph, rounded, weights
        self._dtype, self._calibration = WEIGHT_DTYPES[options.dtype], calibration
        self._plan = plan_weights(module, graph, options)
        scheme = options.scheme(graph)
        assert scheme is not None  # otherwise nothing is quantized
        self._method = method_of(SCHEMES[scheme], options.quantize_method)
        #: Weight -> the weight of a layer after it whose factors its last output channels take.
        self._following = {before: name for name in self._plan if (before := weight_before(name, self._plan)) is not None}

    def run(self, whole: WeightFile) -> dict[str, StoredWeight]:
        """The quantized weights. The parameters are in `whole`."""
        stored: dict[str, StoredWeight] = {}
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            if name not in self._plan:
                parameter.data = self._weights.keep(parameter.data)
            elif name not in stored:
                stored |= self._quantize(self._together(name))
            whole.release()
            self._rounded.release()
        return {name: stored[name] for name in self._plan}

    def _together(self, name: str) -> list[str]:
        """The weights whose layers read the same tensor as the layer with the weight `name`."""
        if self._calibration is None or (index := self._calibration.index(self._graph, name)) is None:
            return [name]
        return [other for other in self._plan if self._calibration.index(self._graph, other) == index]

    def _quantize(self, names: list[str]) -> dict[str, StoredWeight]:
        matrices = {name: self._scaled(name) for name in names}
        layers = quantize_layers(matrices, self._plan, self._method, self._inputs(names[0]), self._dtype)
        return {name: self._store(name, layer, names[0]) for name, layer in layers.items()}

    def _inputs(self, name: str) -> LayerInputs | None:
        return None if self._calibration is None else self._calibration.inputs(self._graph, name)

    def _scaled(self, name: str) -> Float32:
        """A weight as [in, out], whose last output channels are multiplied by the factors of the layer after it."""
        matrix, following = self._matrix(name), self._following.get(name)
        if following is None:
            return matrix
        factor = input_factor({following: self._matrix(following)}, self._plan, self._inputs(following), self._dtype)
        if factor is None:
            return matrix
        kept = np.ones(matrix.shape[1] - len(factor), np.float32)
        return matrix * np.concatenate([kept, factor])

    def _matrix(self, name: str) -> Float32:
        """A weight of the checkpoint as [in, out]."""
        numbers: Float32 = self._module.get_parameter(name).data.float().numpy()
        return numbers if self._linear(name) else as_stored(numbers, True)

    def _linear(self, name: str) -> bool:
        return isinstance(self._module.get_submodule(name.rpartition(".")[0]), Linear)

    def _store(self, name: str, layer: QuantizedLayer, first: str) -> StoredWeight:
        """Store a layer. `first`: the first weight whose layer reads the same input."""
        weight, parameter, linear = self._plan[name], self._module.get_parameter(name), self._linear(name)
        numbers = torch.from_numpy(as_used(layer.rounded.numbers, not linear, tuple(parameter.shape)))
        parameter.data = self._rounded.keep(numbers.to(parameter.dtype))
        values = layer.rounded.values if linear or weight.transposed else layer.rounded.values.T
        tensors: dict[str, Array] = {"scale": layer.rounded.scales}
        if layer.tensor_scale is not None:
            tensors["tensor_scale"] = np.array(layer.tensor_scale)
        if layer.input_scale is not None:
            kind = WEIGHT_DTYPES[weight.tensors(self._dtype.name)["input.scale"]]
            tensors["input.scale"] = kind.round(np.array(layer.input_scale, np.float32))
        rescaled = layer.factor is not None and name not in self._following.values()
        if layer.factor is not None and rescaled:
            # For products with the weight on the right, [..., in]; the others read [B, in, H, W] or [B, in, N].
            right = linear or (weight.transposed and (weight.on_the_right or parameter.dim() == 2))
            after = 0 if right else 2 if parameter.dim() == 4 else 1
            tensors["input.factor"] = self._dtype.round(layer.factor).reshape(-1, *[1] * after)
        if layer.branch is not None:
            tensors["low_rank.down"], tensors["low_rank.up"] = map(self._dtype.round, layer.branch)
        places = {key: (self._append(array), array.shape) for key, array in tensors.items()}
        shares = first if weight.inputs == "fp4" and name != first else ""
        weight = replace(weight, rescaled=rescaled, shares=shares)
        return StoredWeight(weight, self._weights.append(pack(values, weight.dtype)), places)

    def _append(self, array: Array) -> Slice:
        return self._weights.append(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def compute_stored(
    module: nn.Module, stored: Mapping[str, StoredWeight], weights: WeightFile, *, round_inputs: bool = True
) -> None:
    """Make `module`, of `built`, compute as the ONNX file does: with rounded inputs, factors and branches."""
    forms = {}
    for name, place in stored.items():
        kinds = place.weight.tensors(str(module.get_parameter(name).dtype).removeprefix("torch."))
        tensors = {
            end: weights.read(where, getattr(torch, kinds[end])).view(shape)
            for end, (where, shape) in place.tensors.items()
            if kinds[end] != "fp8"  # scales of weights are in the module's numbers already
        }
        weight = place.weight if round_inputs else replace(place.weight, inputs="")
        forms[name] = product_form(weight, tensors, module.get_parameter(name).dtype)
    compute_quantized(module, {name: form for name, form in forms.items() if form is not None})
