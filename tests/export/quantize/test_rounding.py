"""Rounding to nearest against a loop over every scale."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sana_export.export.quantize.rounding import round_to_nearest
from sana_export.formats.dtypes import WEIGHT_DTYPES

FINEST = {"float32": np.finfo(np.float32).smallest_subnormal, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def groups(array: np.ndarray, axis: int, block: int) -> list[np.ndarray]:
    """The weights that share a scale, in the order of the scales."""
    if not block:
        return [part.ravel() for part in np.moveaxis(array, axis, 0)]
    rows = [array[first : first + block] for first in range(0, array.shape[0], block)]
    return [column for part in rows for column in part.T]


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize(
    ("bits", "shape", "axis", "block"), [(8, (48, 20), 1, 0), (8, (20, 48), 0, 0), (8, (6, 5, 3, 3), 0, 0), (4, (96, 20), 0, 32)]
)
def test_each_weight_is_rounded_to_the_nearest_multiple(
    dtype: str, bits: int, shape: tuple[int, ...], axis: int, block: int
) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    rounded = round_to_nearest(weight, bits, axis, block, WEIGHT_DTYPES[dtype])
    scales, most = WEIGHT_DTYPES[dtype].widen(rounded.scales).ravel(), 2 ** (bits - 1) - 1
    parts = [groups(array, axis, block) for array in (weight, rounded.values, rounded.numbers)]
    assert len(scales) == len(parts[0])
    for scale, own, values, numbers in zip(scales, *parts, strict=True):
        assert abs(scale / (np.abs(own).max() / most) - 1) < 2.0**-8  # the precision of bfloat16
        assert np.abs(values).max() == most
        assert (numbers == values.astype(np.float32) * scale).all()
        assert (np.abs(own - numbers) <= scale * (0.5 + most * 2.0**-8)).all()
        inside = np.abs(own) <= most * scale
        assert (np.abs(own - numbers)[inside] <= scale * 0.5000001).all()


# The smallest one is below all float32 numbers.
@pytest.mark.parametrize(
    ("dtype", "largest"), sorted({*itertools.product(WEIGHT_DTYPES, [0.4, 1.4, 1.6, 3.0, 100.0])} - {("float32", 0.4)})
)
def test_a_scale_among_the_smallest_numbers_is_not_too_small(dtype: str, largest: float) -> None:
    weight = np.full((1, 4), largest * FINEST[dtype] * 127, np.float64).astype(np.float32)
    rounded = round_to_nearest(weight, 8, 0, 0, WEIGHT_DTYPES[dtype])
    scale = WEIGHT_DTYPES[dtype].widen(rounded.scales)[0]
    assert scale >= FINEST[dtype]
    assert abs(rounded.numbers[0, 0] - weight[0, 0]) <= scale * 0.5000001


def test_rows_of_zeros_stay_zeros() -> None:
    rounded = round_to_nearest(np.zeros((2, 32), np.float32), 8, 0, 0, WEIGHT_DTYPES["float16"])
    assert not rounded.values.any()
    assert (rounded.scales == 1).all()
