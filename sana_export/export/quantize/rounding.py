"""Rounds weights to few bits: to the nearest multiples of scales that fit the largest weights, or that make the least error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_export.export.quantize.grids import GRIDS, Grid, ScaleType
from sana_export.formats.arrays import Array, Float32
from sana_export.formats.quantized import scale_shape, spread

#: Weights that are searched at a time: 1 MiB, which caches hold.
_PIECE = 1 << 18


@dataclass(frozen=True, eq=False)
class Rounded:
    """A rounded array."""

    #: Integers in the shape of the array, or the bits of FP8 or FP4 numbers.
    values: npt.NDArray[np.int8]
    #: As they are stored: in the dtype of the graph (formats/dtypes.py), or as the bits of FP8 numbers (`BlockScales`).
    scales: Array
    #: The numbers that they stand for.
    numbers: Float32


def round_to_nearest(weight: Float32, kind: str, axis: int, block: int, scales: ScaleType) -> Rounded:
    """`weight` in the numbers of `kind` (`GRIDS`), with one scale for each index of `axis`, or for each `block` along it.

    A scale is the largest magnitude over the largest number, rounded to `scales`.
    """
    largest = _largest(np.abs(weight), axis, block)
    return round_to_scales(weight, _at_least(largest, GRIDS[kind].most, scales), kind, axis, block, scales)


def round_to_scales(weight: Float32, stored: Array, kind: str, axis: int, block: int, scales: ScaleType) -> Rounded:
    """`weight` as the nearest multiples of the scales `stored`, which are of the type `scales`. Larger weights saturate."""
    grid = GRIDS[kind]
    wide: Float32 = spread(scales.widen(stored), weight.ndim, axis, block)
    numbers = grid.round((weight / wide).astype(np.float32, copy=False))
    return Rounded(grid.encode(numbers), stored, numbers * wide)


def round_with_search(
    weight: Float32, kind: str, axis: int, block: int, scales: ScaleType, importance: Float32 | None = None
) -> Rounded:
    """As `round_to_nearest`, with the scales of `search_scales`."""
    found = search_scales(weight, kind, axis, block, scales, importance)
    return round_to_scales(weight, found, kind, axis, block, scales)


def search_scales(weight: Float32, kind: str, axis: int, block: int, scales: ScaleType, importance: Float32 | None = None) -> Array:
    """The stored scales of `weight` [in, out] with the least squared error, out of shares (`Grid`) of those of `round_to_nearest`.

    There is one for each output channel (`axis` 1, `block` 0), or for each `block` of inputs (`axis` 0). `importance` [in] weighs
    the errors: the mean square of each input makes their sum the squared error of the layer's outputs, if inputs are not
    correlated. Without it, all inputs weigh the same. The search for a clip is that of AWQ (arXiv 2306.00978).
    """
    assert (axis, bool(block)) in ((1, False), (0, True)), "a scale belongs to an output channel"
    inputs, outputs = weight.shape
    size = block or inputs
    blocks = weight.reshape(inputs // size, size, outputs)
    found = np.empty((len(blocks), outputs), scales.numpy)
    weigh = np.ones((len(blocks), 1, size), np.float32) if importance is None else importance.reshape(len(blocks), 1, size)
    # Errors are compared within a block only, so their unit is free: keep them away from the ends of float32.
    weigh = weigh / np.maximum(weigh.max(axis=2, keepdims=True), np.finfo(np.float32).tiny)
    width = max(1, _PIECE // size)
    for index, own in enumerate(blocks):
        for first in range(0, outputs, width):
            piece = slice(first, first + width)
            found[index, piece] = _best_scales(np.ascontiguousarray(own[:, piece]), weigh[index], GRIDS[kind], scales)
    return found.reshape(scale_shape(weight.shape, axis, block))


def _best_scales(columns: Float32, weigh: Float32, grid: Grid, scales: ScaleType) -> Array:
    """The stored scale of each of the `columns` [size, n], whose errors have the weights `weigh` [1, size]."""
    largest = np.abs(columns).max(axis=0)
    best = _at_least(largest, grid.most, scales)
    least = np.full(largest.shape, np.inf, np.float32)
    unit = np.where(largest > 0, largest, np.float32(1))
    for share in grid.shares:
        stored = _at_least(largest * np.float32(share), grid.most, scales)
        wide = scales.widen(stored)
        errors = grid.round(columns / wide)
        errors *= wide
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


def _at_least(largest: Float32, most: float, scales: ScaleType) -> Array:
    """The stored scales. Among tiny numbers of half precision, the nearest one may be much too small: then take the next one."""
    stored = scales.round(np.where(largest > 0, largest / np.float32(most), np.float32(1)))
    bits = np.ascontiguousarray(stored).view(f"<u{scales.bytes}")  # the next larger positive number has the next bits
    short = scales.widen(stored) * np.float32(most + 0.5) < largest
    return (bits + short.astype(bits.dtype)).view(scales.numpy)
