"""Rounds weights to few bits: to the nearest multiples of scales that fit the largest weights, or that make the least error."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Array, Float32
from sana_export.formats.dtypes import DType
from sana_export.formats.quantized import FP8_MAX, decode_fp8, dequantize, scale_shape, spread

#: The shares of the largest magnitude that a search of scales tries, from the one of `round_to_nearest` on.
SHARES = tuple(1 - step / 40 for step in range(25))
#: Weights that are searched at a time: 1 MiB, which caches hold.
_PIECE = 1 << 18


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded array."""

    #: Integers in the shape of the array, or the bits of FP8 numbers.
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
    return round_to_scales(
        weight, _at_least(_largest(np.abs(weight), axis, block), 2 ** (bits - 1) - 1, dtype), bits, axis, block, dtype
    )


def round_to_scales(weight: Float32, stored: Array, bits: int, axis: int, block: int, dtype: DType) -> Rounded:
    """`weight` as the nearest multiples of the scales `stored`, which are of `dtype`. Larger weights saturate."""
    most, scales = 2 ** (bits - 1) - 1, dtype.widen(stored)
    values = np.rint(weight / spread(scales, weight.ndim, axis, block)).clip(-most, most).astype(np.int8)
    return Rounded(values, stored, dequantize(values, scales, axis, block))


def round_with_search(
    weight: Float32, bits: int, axis: int, block: int, dtype: DType, importance: Float32 | None = None
) -> Rounded:
    """As `round_to_nearest`, with the scales of `search_scales`."""
    return round_to_scales(weight, search_scales(weight, bits, axis, block, dtype, importance), bits, axis, block, dtype)


def search_scales(weight: Float32, bits: int, axis: int, block: int, dtype: DType, importance: Float32 | None = None) -> Array:
    """The stored scales of `weight` [in, out] with the least squared error, out of `SHARES` of those of `round_to_nearest`.

    There is one for each output channel (`axis` 1, `block` 0), or for each `block` of inputs (`axis` 0). `importance` [in] weighs
    the errors: the mean square of each input makes their sum the squared error of the layer's outputs, if inputs are not
    correlated. Without it, all inputs weigh the same. The search for a clip is that of AWQ (arXiv 2306.00978).
    """
    assert (axis, bool(block)) in ((1, False), (0, True)), "a scale belongs to an output channel"
    inputs, outputs = weight.shape
    size, most = block or inputs, 2 ** (bits - 1) - 1
    blocks = weight.reshape(inputs // size, size, outputs)
    found = np.empty((len(blocks), outputs), dtype.numpy)
    weigh = np.ones((len(blocks), 1, size), np.float32) if importance is None else importance.reshape(len(blocks), 1, size)
    # Errors are compared within a block only, so their unit is free: keep them away from the ends of float32.
    weigh = weigh / np.maximum(weigh.max(axis=2, keepdims=True), np.finfo(np.float32).tiny)
    width = max(1, _PIECE // size)
    for index, own in enumerate(blocks):
        for first in range(0, outputs, width):
            piece = slice(first, first + width)
            found[index, piece] = _best_scales(np.ascontiguousarray(own[:, piece]), weigh[index], most, dtype)
    return found.reshape(scale_shape(weight.shape, axis, block))


def _best_scales(columns: Float32, weigh: Float32, most: int, dtype: DType) -> Array:
    """The stored scale of each of the `columns` [size, n], whose errors have the weights `weigh` [1, size]."""
    largest = np.abs(columns).max(axis=0)
    best = _at_least(largest, most, dtype)
    least = np.full(largest.shape, np.inf, np.float32)
    unit = np.where(largest > 0, largest, np.float32(1))
    for share in SHARES:
        stored = _at_least(largest * np.float32(share), most, dtype)
        scales = dtype.widen(stored)
        errors = np.rint(columns / scales)
        np.clip(errors, -most, most, out=errors)
        errors *= scales
        errors -= columns
        errors /= unit
        sums = (weigh @ np.square(errors, out=errors))[0]
        better = sums < least
        best, least = np.where(better, stored, best), np.where(better, sums, least)
    return best


def _largest(magnitudes: Float32, axis: int, block: int) -> Float32:
    """The largest of the magnitudes that share a scale, in the shape of the scales."""
    shape = magnitudes.shape
    if not block:
        return magnitudes.max(axis=tuple(other for other in range(len(shape)) if other != axis))
    blocks = magnitudes.reshape(*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :])
    return blocks.max(axis=axis + 1).reshape(scale_shape(shape, axis, block))


def _at_least(largest: Float32, most: float, dtype: DType) -> Array:
    """The stored scales. Among tiny numbers of half precision, the nearest one may be much too small: then take the next one."""
    stored = dtype.round(np.where(largest > 0, largest / np.float32(most), np.float32(1)))
    bits = np.ascontiguousarray(stored).view(f"<u{dtype.bytes}")  # the next larger positive number has the next bits
    short = dtype.widen(stored) * np.float32(most + 0.5) < largest
    return (bits + short.astype(bits.dtype)).view(dtype.numpy)


def round_to_fp8(weight: Float32, dtype: DType) -> Rounded:
    """`weight` [in, out] in FP8 (E4M3), with one scale for each output channel: its largest magnitude over FP8's."""
    largest = np.abs(weight).max(axis=0)
    stored = _at_least(largest, FP8_MAX, dtype)
    scales = dtype.widen(stored)
    codes = (weight / scales).clip(-FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.int8)
    return Rounded(codes, stored, dequantize(decode_fp8(codes), scales, axis=1, block=0))
