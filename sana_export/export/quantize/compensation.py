"""Rounds weights one input at a time, and lets the inputs that are not rounded yet make up for the error.

This is GPTQ (arXiv 2210.17323). With the inputs x of a layer and H = mean x x^T over a sample of them, the outputs' mean squared
error after a change D of the weights is trace(D^T H D). After input i is rounded, the change of the later weights that makes up
most for it is a multiple of row i of the upper factor U of H^-1 = U^T U.

Inputs with a large mean square come first, which measured 5 to 25% less error than the order of the inputs. So scales are searched
before anything is rounded. Damping adds a share of each diagonal entry of H to it, not a share of their mean, which outliers raise
far above the other entries. How large it must be depends on how well the sample stands for other inputs: the last rows decide.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sana_export.export.quantize.grids import GRIDS, Grid, ScaleType
from sana_export.export.quantize.rounding import Rounded, round_to_nearest, search_scales
from sana_export.formats.arrays import Float32
from sana_export.formats.quantized import spread

Float64 = npt.NDArray[np.float64]

#: The shares of each diagonal entry of H that are tried as damping. The last one leaves little of the compensation.
DAMPINGS = (0.1, 1.0, 10.0)
#: The share of the rows, from the end, that chooses one of them.
_HELD_OUT = 0.25
#: So many output channels at most, at equal distances, take part in the choice.
_CHOOSING = 256
#: Inputs after which the changes of all later ones are applied, in one product.
BATCH = 64
#: Output channels that are rounded at a time: their part of a batch fits into caches.
_COLUMNS = 1024
#: Rows of the sample that are multiplied at a time.
_ROWS = 256
#: An upper triangle of this size is inverted as a full matrix.
_SMALL = 64


def round_with_compensation(weight: Float32, rows: Float32, kind: str, block: int, scales: ScaleType) -> Rounded:
    """`weight` [in, out] in the numbers of `kind`, so that the layer's outputs for inputs like `rows` [R, in] change little.

    A scale belongs to an output channel (`block` 0), or to `block` inputs of one. The damping is chosen on the last rows, for which
    the rows should be in the order of the calls that they come from. An output channel whose error on `rows` would be larger than
    with `round_to_nearest` gets the latter. Inputs that are zero in all rows are rounded to the nearest multiple. Needs the memory
    of three float64 arrays [in, in] and of four arrays like `weight`.
    """
    damping = _chosen_damping(weight, rows, kind, block, scales)
    found = _compensated(weight, rows, damping, kind, block, scales)
    nearest = round_to_nearest(weight, kind, 0 if block else 1, block, scales)
    better = _errors(weight, found.numbers, rows) <= _errors(weight, nearest.numbers, rows)
    return Rounded(
        np.where(better, found.values, nearest.values),
        np.where(better, found.scales, nearest.scales),
        np.where(better, found.numbers, nearest.numbers),
    )


def _chosen_damping(weight: Float32, rows: Float32, kind: str, block: int, scales: ScaleType) -> float:
    """The one of `DAMPINGS` with the least relative error on the last rows, if the compensation knows only the others."""
    known = len(rows) - int(len(rows) * _HELD_OUT)
    if len(DAMPINGS) == 1 or not 0 < known < len(rows):
        return DAMPINGS[0]
    some = np.ascontiguousarray(weight[:, :: -(-weight.shape[1] // _CHOOSING)])
    wanted = np.square(rows[known:] @ some).sum(axis=0, dtype=np.float64)
    errors = []
    for damping in DAMPINGS:
        numbers = _compensated(some, rows[:known], damping, kind, block, scales).numbers
        errors.append((_errors(some, numbers, rows[known:])[wanted > 0] / wanted[wanted > 0]).sum())
    return DAMPINGS[int(np.argmin(errors))]


def _compensated(weight: Float32, rows: Float32, damping: float, kind: str, block: int, scales: ScaleType) -> Rounded:
    """`weight`, rounded in the order of the mean squares of its inputs."""
    axis, moments = (0 if block else 1), second_moments(rows)
    order = np.argsort(-moments.diagonal(), kind="stable")
    factor = inverse_factor(moments[np.ix_(order, order)], damping)
    importance = np.empty(len(weight), np.float32)
    importance[order] = np.square(1 / factor.diagonal())  # what an error costs after the later inputs made up for it
    stored = search_scales(weight, kind, axis, block, scales, importance)
    wide, numbers, grid = scales.widen(stored), np.empty(weight.shape, np.float32), GRIDS[kind]
    for first in range(0, weight.shape[1], _COLUMNS):
        some = slice(first, first + _COLUMNS)
        scale = np.repeat(wide[:, some], block, axis=0)[order] if block else np.broadcast_to(wide[some], weight[:, some].shape)
        numbers[order, some] = _round_in_order(weight[order, some], factor, scale, grid)
    return Rounded(grid.encode(numbers), stored, numbers * spread(wide, weight.ndim, axis, block))


def second_moments(rows: Float32) -> Float64:
    """The mean of x x^T [in, in] over the rows x of `rows` [R, in]."""
    total = np.zeros((rows.shape[1], rows.shape[1]))
    for first in range(0, len(rows), _ROWS):
        part = rows[first : first + _ROWS].astype(np.float64)
        total += part.T @ part
    return total / max(len(rows), 1)


def inverse_factor(moments: Float64, damping: float) -> Float32:
    """The upper triangle U [in, in] with U^T U = H^-1. H are the `moments`, which it overwrites, with a damped diagonal.

    An input whose mean square is zero counts as uncorrelated, with a mean square of 1.
    """
    diagonal = moments.diagonal().copy()
    dead = diagonal <= 0
    moments[dead] = 0
    moments[:, dead] = 0
    np.fill_diagonal(moments, np.where(dead, 1.0, diagonal * (1 + damping)))
    # With both axes reversed, a lower factor L L^T becomes an upper one, V V^T. Then U is the inverse of V.
    upper = np.ascontiguousarray(np.linalg.cholesky(moments[::-1, ::-1])[::-1, ::-1])
    return _inverse(upper).astype(np.float32)


def _inverse(upper: Float64) -> Float64:
    """The inverse of an upper triangle, by halves: numpy has no solver for triangles, and a general one takes six times as long."""
    size = len(upper)
    if size <= _SMALL:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    found = np.zeros_like(upper)
    found[:half, :half], found[half:, half:] = _inverse(upper[:half, :half]), _inverse(upper[half:, half:])
    found[:half, half:] = -(found[:half, :half] @ upper[:half, half:]) @ found[half:, half:]
    return found


def _round_in_order(rest: Float32, factor: Float32, scales: Float32, grid: Grid) -> Float32:
    """The numbers of `grid` for the weights `rest` [in, n] with their `scales` [in, n], from the first input to the last."""
    values, inputs = np.empty(rest.shape, np.float32), len(rest)
    for first in range(0, inputs, BATCH):
        last = min(first + BATCH, inputs)
        errors = np.empty((last - first, rest.shape[1]), np.float32)
        for index in range(first, last):
            level = values[index] = grid.round(rest[index] / scales[index])
            error = errors[index - first] = (rest[index] - level * scales[index]) / factor[index, index]
            rest[index + 1 : last] -= np.outer(factor[index, index + 1 : last], error)
        rest[last:] -= factor[first:last, last:].T @ errors
    return values


def _errors(weight: Float32, numbers: Float32, rows: Float32) -> Float64:
    """The squared error of each output channel for `rows`."""
    total, change = np.zeros(weight.shape[1]), numbers - weight
    for first in range(0, len(rows), _ROWS):
        total += np.square(rows[first : first + _ROWS] @ change).sum(axis=0, dtype=np.float64)
    return total
