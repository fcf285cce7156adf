"""The ranges of activations: one scale for all inputs of a layer.

The errors follow ONNX's `QuantizeLinear` and `DequantizeLinear` without zero points: divide by the scale, round to the nearest
level, ties to even, saturate, multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sana_export.export.quantize.grids import GRIDS, round_fp4, round_fp8
from sana_export.formats.arrays import Float32
from sana_export.formats.quantized import FP4_MAX, FP8_MAX
from sana_export.quantization.schemes import BLOCK


@dataclass(frozen=True)
class Levels:
    """The numbers that a quantized activation can have, at a scale of 1."""

    #: The largest one.
    most: float
    #: The level nearest to each number.
    round: Callable[[Float32], Float32]
    #: The range is so many times what was seen. Other inputs may be larger, and a saturated outlier costs much.
    headroom: float


def round_fp4_blocks(values: Float32) -> Float32:
    """`values` [R, in] in FP4, with a scale in FP8 for each 16 inputs of a row: what TensorRT's TRT_FP4DynamicQuantize does with a
    global scale of 1. A block whose scale would be zero is zero."""
    blocks = values.reshape(len(values), -1, BLOCK)
    scales = round_fp8(np.abs(blocks).max(axis=2, keepdims=True) / np.float32(FP4_MAX))
    divisors: Float32 = np.where(scales > 0, scales, np.float32(np.inf))
    levels: Float32 = blocks / divisors
    return (round_fp4(levels) * scales).reshape(values.shape)


#: A range four times as large costs FP8, or FP8 scales of FP4 blocks, two of the 15 powers of two that it covers, and no precision
#: within the others. It would cost INT8 two bits.
LEVELS = {
    "int8": Levels(127.0, GRIDS["int8"].round, headroom=1.0),
    "fp8": Levels(FP8_MAX, round_fp8, headroom=4.0),
    "fp4": Levels(FP4_MAX * FP8_MAX, round_fp4_blocks, headroom=4.0),
}
#: The percentile of the magnitudes that "percentile" takes as the range. What exceeds it saturates.
PERCENTILE = 99.99
#: The shares of the largest magnitude that "mse" tries. An outlier may be 100 times as large as the other values.
SHARES = tuple(2.0 ** (-step / 8) for step in range(49))
#: Values that are rounded at a time: 4 MiB.
_PIECE = 1 << 20


def activation_scale(rows: Float32, maximum: float, dtype: str, method: str, importance: Float32 | None = None) -> float:
    """The scale of a layer's inputs in `dtype`, a key of `LEVELS`. That of "fp4" is the global one of its blocks.

    `rows` [R, in] is a sample of them, and `maximum` the largest magnitude of all that were seen. `method` chooses the range:
    "max" takes `maximum`, "percentile" the `PERCENTILE` of the magnitudes of `rows`, and "mse" the one of `SHARES` of `maximum`
    whose rounding changes `rows` least in the mean square. The largest range wins a tie. `importance` [in] weighs the changes
    (`input_importance`; None: all the same). The range of FP8 gets a headroom. 1 if all inputs are zero.
    """
    weights = np.ones(rows.shape[1], np.float32) if importance is None else importance
    levels = LEVELS[dtype]
    largest = METHODS[method](rows, float(maximum), levels, weights)
    return largest * levels.headroom / levels.most if largest > 0 else 1.0


def input_importance(weight: Float32, rows: Float32) -> Float32:
    """How much a change of each input [in] matters: the sum over the output channels of its squared weight [in, out] over the mean
    square of the channel for `rows` [R, in]."""
    squares = np.square(rows @ weight).mean(axis=0)
    return np.square(weight) @ np.divide(1, squares, where=squares > 0, out=np.zeros_like(squares))


def quantized(rows: Float32, scale: float, dtype: str) -> Float32:
    """`rows` as a layer that quantizes its inputs to `dtype` with `scale` gets them."""
    factor = np.float32(scale)
    return LEVELS[dtype].round(rows / factor) * factor


def _maximum(rows: Float32, maximum: float, levels: Levels, importance: Float32) -> float:
    return maximum


def _percentile(rows: Float32, maximum: float, levels: Levels, importance: Float32) -> float:
    return min(float(np.percentile(np.abs(rows), PERCENTILE)), maximum) or maximum


def _least_error(rows: Float32, maximum: float, levels: Levels, importance: Float32) -> float:
    if not maximum:
        return 0.0
    scales = [np.float32(maximum * share * levels.headroom / levels.most) for share in SHARES]
    errors = np.zeros(len(scales))
    count = max(1, _PIECE // rows.shape[1])
    for piece in (rows[first : first + count] for first in range(0, len(rows), count)):
        for index, scale in enumerate(scales):
            changes = np.square(levels.round(piece / scale) * scale - piece).sum(axis=0, dtype=np.float64)
            errors[index] += changes @ importance
    return maximum * SHARES[int(errors.argmin())]


#: The range that each method chooses.
METHODS: dict[str, Callable[[Float32, float, Levels, Float32], float]] = {
    "max": _maximum,
    "percentile": _percentile,
    "mse": _least_error,
}
