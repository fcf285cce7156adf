"""Rounds weights to few bits, without looking at data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Array, Float32
from sana_export.formats.dtypes import DType
from sana_export.formats.quantized import dequantize, scale_shape, spread


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded array."""

    #: Integers in the shape of the array.
    values: npt.NDArray[np.int8]
    #: As they are stored, in the dtype of the graph (formats/dtypes.py).
    scales: Array
    #: The numbers that they stand for.
    numbers: Float32


def round_to_nearest(weight: Float32, bits: int, axis: int, block: int, dtype: DType) -> Rounded:
    """`weight` in `bits` bits, with one scale for each index of `axis`, or for each `block` along it.

    A scale is the largest magnitude over the largest integer, rounded to `dtype`. The integers are symmetric: the lowest one,
    such as -128, is not used, so a weight and its negative have the same error.
    """
    most = 2 ** (bits - 1) - 1
    largest = _largest(np.abs(weight), axis, block)
    stored = _at_least(largest, most, dtype)
    scales = dtype.widen(stored)
    values = np.rint(weight / spread(scales, weight.ndim, axis, block)).clip(-most, most).astype(np.int8)
    return Rounded(values, stored, dequantize(values, scales, axis, block))


def _largest(magnitudes: Float32, axis: int, block: int) -> Float32:
    """The largest of the magnitudes that share a scale, in the shape of the scales."""
    shape = magnitudes.shape
    if not block:
        return magnitudes.max(axis=tuple(other for other in range(len(shape)) if other != axis))
    blocks = magnitudes.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
    return blocks.max(axis=axis + 1).reshape(scale_shape(shape, axis, block))


def _at_least(largest: Float32, most: int, dtype: DType) -> Array:
    """The stored scales. Among tiny numbers of half precision, the nearest one may be much too small: then take the next one."""
    stored = dtype.round(np.where(largest > 0, largest / np.float32(most), np.float32(1)))
    bits = np.ascontiguousarray(stored).view(f"<u{dtype.bytes}")  # the next larger positive number has the next bits
    short = dtype.widen(stored) * np.float32(most + 0.5) < largest
    return (bits + short.astype(bits.dtype)).view(dtype.numpy)
