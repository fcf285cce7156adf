"""Quantizes layers of a graph: chooses factors, ranges and the branch, and rounds the weights, as a `Method` says.

A layer computes y = x W, with W as [in, out] here, however its graph stores it. The steps are, in this order: divide the inputs by
factors and multiply W by them, take the branch out of W, round what remains, choose the range of the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from sana_export.export.quantize.compensation import round_with_compensation
from sana_export.export.quantize.grids import BlockScales, ScaleType
from sana_export.export.quantize.low_rank import low_rank_branch
from sana_export.export.quantize.ranges import activation_scale, input_importance, quantized
from sana_export.export.quantize.rescaling import HEADROOM, rescaling
from sana_export.export.quantize.rounding import Rounded, round_to_nearest, round_with_search
from sana_export.export.quantize.statistics import LayerInputs
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES, DType
from sana_export.formats.quantized import FP4_MAX, FP8_MAX
from sana_export.manifest import QuantizedWeight
from sana_export.quantization.method import Method

#: The least positive numbers: no step is 0.
_LEAST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-24}


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """What takes the place of a weight [in, out]. All numbers are of the graph's dtype, as float32."""

    #: The rounded weight, of the quotient's inputs and without the branch.
    rounded: Rounded
    #: What the layer's inputs are multiplied by, [in].
    factor: Float32 | None = None
    #: The branch, [in, rank] and [rank, out].
    branch: tuple[Float32, Float32] | None = None
    #: The step of the layer's rounded inputs.
    input_scale: float | None = None
    #: What the scales of the weight are multiplied by, if they are FP8 numbers.
    tensor_scale: np.float32 | None = None


def quantize_layers(
    matrices: Mapping[str, Float32],
    weights: Mapping[str, QuantizedWeight],
    method: Method,
    inputs: LayerInputs | None,
    dtype: DType,
) -> dict[str, QuantizedLayer]:
    """The layers with the `matrices` [in, out], which read the same `inputs` and may be stored as `weights` says, by name.

    `inputs` may be None if neither the method nor the weights need them. `dtype` is the graph's.
    """
    factor, found = input_factor(matrices, weights, inputs, dtype), dict[str, QuantizedLayer]()
    if factor is not None and inputs is not None:
        inputs = LayerInputs(inputs.index, inputs.maximum * factor * np.float32(HEADROOM), inputs.rows * factor)
    for name, matrix in matrices.items():
        weight = weights[name]
        rest = matrix if factor is None else matrix / _for_each_tap(factor, matrix)[:, None]
        branch = None
        if weight.rank:
            down, up = low_rank_branch(rest, None if inputs is None else inputs.rows, weight.rank)
            branch = _stored(down, dtype), _stored(up, dtype)
            rest = rest - branch[0] @ branch[1]
        scale = None if not weight.inputs else _input_scale(rest, weight, method, inputs, dtype)
        if found and weight.inputs == "fp4":  # these layers share their rounded input (graph.py)
            scale = next(iter(found.values())).input_scale
        scales = _scale_type(rest, weight, dtype)
        whole = scales.tensor_scale if isinstance(scales, BlockScales) else None
        found[name] = QuantizedLayer(_rounded(rest, weight, method, inputs, scales), factor, branch, scale, whole)
    return found


def _input_scale(matrix: Float32, weight: QuantizedWeight, method: Method, inputs: LayerInputs | None, dtype: DType) -> float:
    """The step of the rounded inputs."""
    assert inputs is not None  # an export asks for a calibration
    importance = input_importance(_summed_taps(matrix, inputs), inputs.rows)
    scale = activation_scale(inputs.rows, float(inputs.maximum.max()), weight.inputs, method.ranges, importance)
    if weight.inputs == "fp4" and dtype.name == "float16":
        # The scale of a block is rounded twice, to FP8 and to float16, and may be rounded up: its numbers must stay finite.
        scale = min(scale, 65504 * (1 - 2.0**-10) / (FP4_MAX * FP8_MAX))
    dtype = WEIGHT_DTYPES[weight.tensors(dtype.name)["input.scale"]]
    return max(float(dtype.widen(dtype.round(np.array([scale], np.float32)))[0]), _LEAST[dtype.name])


def input_factor(
    matrices: Mapping[str, Float32], weights: Mapping[str, QuantizedWeight], inputs: LayerInputs | None, dtype: DType
) -> Float32 | None:
    """What `quantize_layers` multiplies the inputs by, for all layers that read them. None: nothing."""
    if inputs is None or not all(weights[name].rescaled for name in matrices):
        return None
    weight = weights[next(iter(matrices))]
    together = np.concatenate([_summed_taps(matrix, inputs) for matrix in matrices.values()], axis=1)
    round_inputs = partial(_quantize_rows, dtype=weight.inputs) if weight.inputs else None

    def round_weight(matrix: Float32) -> Float32:
        return _nearest(matrix, weight, _scale_type(matrix, weight, dtype)).numbers

    factors = rescaling(together, inputs.maximum, inputs.rows, round_weight, round_inputs)
    stored = _stored((1 / factors).astype(np.float32), dtype)
    return None if (stored == 1).all() else stored


def _quantize_rows(rows: Float32, maximum: Float32, *, dtype: str) -> Float32:
    return quantized(rows, activation_scale(rows, float(maximum.max()), dtype, "max"), dtype)


def _rounded(matrix: Float32, weight: QuantizedWeight, method: Method, inputs: LayerInputs | None, scales: ScaleType) -> Rounded:
    seen = inputs is not None and len(inputs.maximum) == len(matrix)  # a 3x3 convolution reads nine pixels
    if method.gptq and seen and weight.dtype != "fp8":
        assert inputs is not None
        return round_with_compensation(matrix, inputs.rows, weight.dtype, weight.block, scales)
    if method.search and weight.dtype != "fp8":
        importance = np.square(inputs.rows).mean(axis=0) if seen and inputs is not None else None
        return round_with_search(matrix, weight.dtype, 0 if weight.block else 1, weight.block, scales, importance)
    return _nearest(matrix, weight, scales)


def _nearest(matrix: Float32, weight: QuantizedWeight, scales: ScaleType) -> Rounded:
    return round_to_nearest(matrix, weight.dtype, 0 if weight.block else 1, weight.block, scales)


def _scale_type(matrix: Float32, weight: QuantizedWeight, dtype: DType) -> ScaleType:
    """How the scales of a weight are stored."""
    return BlockScales.of(matrix, dtype) if weight.dtype == "fp4" else dtype


def _for_each_tap(factor: Float32, matrix: Float32) -> Float32:
    """`factor` [C] for the rows of a convolution's matrix [C * taps, out]."""
    return np.repeat(factor, len(matrix) // len(factor))


def _summed_taps(matrix: Float32, inputs: LayerInputs) -> Float32:
    """A convolution's matrix [C * taps, out] as a product over C channels, for inputs that change little between the taps."""
    channels = len(inputs.maximum)
    return matrix if len(matrix) == channels else matrix.reshape(channels, -1, matrix.shape[1]).sum(axis=1)


def _stored(numbers: Float32, dtype: DType) -> Float32:
    """The numbers as the graph stores them."""
    return dtype.widen(dtype.round(numbers))
