"""Rounding to nearest, and the search of scales, against loops over every scale."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sana_export.export.quantize.grids import GRIDS
from sana_export.export.quantize.rounding import round_to_nearest, round_with_search
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
    rounded = round_to_nearest(weight, f"int{bits}", axis, block, WEIGHT_DTYPES[dtype])
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
    rounded = round_to_nearest(weight, "int8", 0, 0, WEIGHT_DTYPES[dtype])
    scale = WEIGHT_DTYPES[dtype].widen(rounded.scales)[0]
    assert scale >= FINEST[dtype]
    assert abs(rounded.numbers[0, 0] - weight[0, 0]) <= scale * 0.5000001


def test_rows_of_zeros_stay_zeros() -> None:
    rounded = round_to_nearest(np.zeros((2, 32), np.float32), "int8", 0, 0, WEIGHT_DTYPES["float16"])
    assert not rounded.values.any()
    assert (rounded.scales == 1).all()


CASES = [(8, 48, 1, 0), (4, 96, 0, 32), (4, 64, 1, 0)]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("bits", "inputs", "axis", "block"), CASES)
def test_a_search_finds_the_scale_with_the_least_error(
    bits: int, inputs: int, axis: int, block: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sana_export.export.quantize.rounding._PIECE", 7 * (block or inputs)
    )  # several pieces, the last one shorter
    random = np.random.default_rng(1)
    weight = random.standard_t(3, (inputs, 20)).astype(np.float32)
    importance = np.exp(2 * random.standard_normal(inputs)).astype(np.float32)
    rounded = round_with_search(weight, f"int{bits}", axis, block, WEIGHT_DTYPES[dtype], importance)
    most = 2 ** (bits - 1) - 1
    scales = WEIGHT_DTYPES[dtype].widen(rounded.scales).ravel()
    every = np.broadcast_to(importance[:, None], weight.shape)
    parts = [groups(array, axis, block) for array in (weight, rounded.numbers, every)]
    for scale, own, numbers, weigh in zip(scales, *parts, strict=True):
        exact = np.array([np.abs(own).max() * share / most for share in GRIDS["int8"].shares], np.float32)
        tried = WEIGHT_DTYPES[dtype].widen(WEIGHT_DTYPES[dtype].round(exact))
        errors = [(weigh * (np.rint(own / one).clip(-most, most) * one - own) ** 2).sum(dtype=np.float64) for one in tried]
        assert (weigh * (numbers - own) ** 2).sum(dtype=np.float64) <= min(errors) * (1 + 1e-5)
        assert np.abs(scale / tried - 1).min() < 1e-6
        assert len(np.unique(np.rint(numbers / scale))) > 1


@pytest.mark.parametrize(("bits", "inputs", "axis", "block"), CASES)
def test_a_search_lowers_the_error_of_the_outputs(bits: int, inputs: int, axis: int, block: int) -> None:
    """Without importance, the error of the weights. With it, the error of the outputs, which can fall while the former rises."""
    random = np.random.default_rng(2)
    weight = random.standard_t(3, (inputs, 200)).astype(np.float32)
    rows = (random.standard_normal((400, inputs)) * np.exp(1.5 * random.standard_normal(inputs))).astype(np.float32)
    importance = np.square(rows).mean(axis=0)
    dtype = WEIGHT_DTYPES["float16"]
    nearest = round_to_nearest(weight, f"int{bits}", axis, block, dtype)
    plain = round_with_search(weight, f"int{bits}", axis, block, dtype)
    weighed = round_with_search(weight, f"int{bits}", axis, block, dtype, importance)
    same = round_with_search(weight, f"int{bits}", axis, block, dtype, np.ones(inputs, np.float32))
    assert (same.values == plain.values).all()
    changes = [np.square(one.numbers - weight).sum() for one in (plain, nearest)]
    assert changes[0] <= (0.97 if bits == 4 else 1.0) * changes[1]
    errors = [np.square(rows @ (one.numbers - weight)).sum() for one in (weighed, plain, nearest)]
    assert errors[0] < (0.75 if bits == 4 else 0.97) * min(errors[1:])


def test_a_search_keeps_zeros_and_works_with_any_unit() -> None:
    dtype = WEIGHT_DTYPES["float32"]
    weight = np.random.default_rng(3).standard_normal((64, 8)).astype(np.float32)
    weight[:32, 2] = 0
    plain = round_with_search(weight, "int4", 0, 32, dtype, np.full(64, 1e-35, np.float32))
    large = round_with_search(weight * np.float32(2.0**100), "int4", 0, 32, dtype, np.full(64, 1e35, np.float32))
    assert (plain.values == large.values).all()
    assert not plain.values[:32, 2].any()
    assert plain.scales[0, 2] == 1
    assert round_with_search(weight, "int4", 0, 32, dtype, np.zeros(64, np.float32)).scales.all()


@pytest.mark.parametrize("name", ["float16", "float32", "bfloat16"])
def test_fp8_scales_fit_channels_of_every_size(name: str) -> None:
    dtype = WEIGHT_DTYPES[name]
    weight = np.random.default_rng(3).standard_normal((64, 6)).astype(np.float32) * np.array(
        [0, 1e-6, 1e-5, 3e-5, 1, 100], np.float32
    )
    weight[0] = 0
    rounded = round_to_nearest(weight, "fp8", 1, 0, dtype)
    assert np.isfinite(rounded.numbers).all()
    error = np.abs(rounded.numbers - weight).max(axis=0)
    scales = dtype.widen(rounded.scales)
    assert (error <= np.abs(weight).max(axis=0) / 16 + scales * 2.0**-9).all()
