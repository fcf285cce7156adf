"""Ranges of activations against brute force, and FP8 against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sana_export.export.quantize.grids import round_fp8
from sana_export.export.quantize.ranges import METHODS, SHARES, activation_scale, input_importance, quantized

FP8_MOST = 448.0


def as_torch(values: np.ndarray) -> np.ndarray:
    """torch's E4M3 of saturated values: its own conversion makes NaN of values from 480 on."""
    inside = torch.from_numpy(values).clamp(-FP8_MOST, FP8_MOST)
    return inside.to(torch.float8_e4m3fn).float().numpy()


def rows_with_outliers() -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((512, 96)).astype(np.float32)
    rows[::64, 7] *= 60
    return rows


def reference(rows: np.ndarray, scale: float, dtype: str) -> np.ndarray:
    wide = torch.from_numpy(rows)
    if dtype == "int8":
        return (torch.fake_quantize_per_tensor_affine(wide, scale, 0, -127, 127)).numpy()
    return as_torch((wide / scale).numpy()) * np.float32(scale)


def test_fp8_is_that_of_torch() -> None:
    every_half = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every_half = every_half[np.isfinite(every_half)]
    levels = np.arange(256, dtype=np.uint8)
    exact = torch.from_numpy(levels).view(torch.float8_e4m3fn).float().numpy()
    exact = np.sort(exact[np.isfinite(exact)])
    ties = (exact[1:] + exact[:-1]) / 2
    near = np.concatenate([np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    drawn = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    for values in (every_half, exact, ties, near, drawn, drawn * 100, drawn * 2.0**-9):
        wanted = as_torch(values.astype(np.float32))
        assert (round_fp8(values.astype(np.float32)).view(np.uint32) == wanted.view(np.uint32)).all()
    assert round_fp8(np.float32([1e30, -np.inf, 449.0])).tolist() == [448, -448, 448]
    assert np.isnan(round_fp8(np.float32([np.nan]))).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_quantized_inputs_are_those_of_torch(dtype: str) -> None:
    rows = rows_with_outliers()
    assert np.abs(quantized(rows, 0.25, dtype) - reference(rows, 0.25, dtype)).max() <= 1e-6


@pytest.mark.parametrize(("dtype", "most"), [("int8", 127), ("fp8", 448 / 4)])
def test_each_method_finds_its_range(dtype: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_export.export.quantize.ranges._PIECE", 1000)  # several pieces, the last one shorter
    rows = rows_with_outliers()
    maximum = float(np.abs(rows).max()) * 1.25
    scales = {method: activation_scale(rows, maximum, dtype, method) for method in METHODS}
    assert scales["max"] == maximum / most
    ordered = np.sort(np.abs(rows).ravel())
    position = 0.9999 * (rows.size - 1)
    low, share = int(position), position % 1
    assert scales["percentile"] * most == pytest.approx(ordered[low] * (1 - share) + ordered[low + 1] * share, rel=1e-6)
    errors = [np.square(reference(rows, maximum * part / most, dtype) - rows).sum(dtype=np.float64) for part in SHARES]
    assert scales["mse"] * most / maximum == pytest.approx(SHARES[int(np.argmin(errors))], rel=1e-12)
    importance = np.exp(np.random.default_rng(1).standard_normal(96)).astype(np.float32)
    importance[7] = 1e-4
    errors = [(np.square(reference(rows, maximum * part / most, dtype) - rows) @ importance).sum() for part in SHARES]
    weighed = activation_scale(rows, maximum, dtype, "mse", importance)
    assert weighed * most / maximum == pytest.approx(SHARES[int(np.argmin(errors))], rel=1e-12)


def test_what_has_small_weights_may_saturate() -> None:
    """An outlier channel with small weights: the error of the outputs falls if the range leaves it out."""
    random = np.random.default_rng(4)
    rows, weight = random.standard_normal((512, 96)).astype(np.float32), random.standard_normal((96, 40)).astype(np.float32)
    rows[:, 7] *= 100
    weight[7] /= 100
    weight[:, 3] *= 1000
    importance = input_importance(weight, rows)
    squares = np.square(rows @ weight).mean(axis=0)
    assert importance == pytest.approx((np.square(weight) / squares).sum(axis=1), rel=1e-5)
    maximum = float(np.abs(rows).max())
    wanted = rows @ weight
    errors = []
    for weights in (importance, None):
        inputs = quantized(rows, activation_scale(rows, maximum, "int8", "mse", weights), "int8")
        errors.append((np.square(inputs @ weight - wanted).mean(axis=0) / squares).mean())
    assert errors[0] < errors[1] / 2


def test_an_outlier_costs_less_with_the_least_error() -> None:
    rows = np.random.default_rng(2).standard_normal((512, 96)).astype(np.float32)
    rows[3, 5] = 40.0
    errors = {
        method: np.square(quantized(rows, activation_scale(rows, 40.0, "int8", method), "int8") - rows).mean()
        for method in ("max", "mse")
    }
    assert errors["mse"] < 0.95 * errors["max"]


@pytest.mark.parametrize("method", METHODS)
def test_inputs_of_zeros_have_a_scale(method: str) -> None:
    zeros = np.zeros((4, 8), np.float32)
    assert activation_scale(zeros, 0.0, "int8", method) == 1.0
    assert activation_scale(zeros, 2.0, "int8", method) > 0
