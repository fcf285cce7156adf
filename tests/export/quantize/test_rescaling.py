"""Factors between inputs and weights: their gain for each kind of quantization, against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from sana_export.export.quantize.ranges import activation_scale, quantized
from sana_export.export.quantize.rescaling import LEAST, MIGRATIONS, MOST, MOST_MIGRATION, rescaling
from sana_export.export.quantize.rounding import round_to_nearest
from sana_export.formats.dtypes import WEIGHT_DTYPES

DTYPE = WEIGHT_DTYPES["float16"]


def layer() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, its inputs with outlier channels, and their maxima. Input 11 is always zero, so is the weight of input 12."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((128, 64)).astype(np.float32)
    rows = random.standard_normal((200, 128)).astype(np.float32)
    rows[:, [3, 37, 64, 90, 127]] *= 50
    rows[:, 11] = weight[12] = 0
    weight[:, 20] *= 100
    return weight, rows, np.abs(rows).max(axis=0) * 1.1


def int8_rows(inputs: np.ndarray, maximum: np.ndarray) -> np.ndarray:
    return quantized(inputs, activation_scale(inputs, float(maximum.max()), "int8", "max"), "int8")


def int8_weight(weight: np.ndarray) -> np.ndarray:
    return round_to_nearest(weight, "int8", 1, 0, DTYPE).numbers


def int4_weight(weight: np.ndarray) -> np.ndarray:
    return round_to_nearest(weight, "int4", 0, 32, DTYPE).numbers


def same_weight(weight: np.ndarray) -> np.ndarray:
    return weight


#: quantize_weight, quantize_rows, and by how much the squared error falls at least.
KINDS = {
    "W8A8": (int8_weight, int8_rows, 10),
    "activations": (same_weight, int8_rows, 10),
    "weights in 4 bits": (int4_weight, None, 3),
}


def output_error(factors, weight, rows, maximum, quantize_weight, quantize_rows) -> float:
    inputs = rows / factors
    inputs = inputs if quantize_rows is None else quantize_rows(inputs, maximum / factors)
    wanted = rows @ weight
    errors = np.square(inputs @ quantize_weight(weight * factors[:, None]) - wanted).sum(axis=0, dtype=np.float64)
    return float((errors / np.square(wanted).sum(axis=0, dtype=np.float64)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_the_outputs_falls(kind: str) -> None:
    weight, rows, maximum = layer()
    quantize_weight, quantize_rows, gain = KINDS[kind]
    factors = rescaling(weight, maximum, rows, quantize_weight, quantize_rows)
    functions = (quantize_weight, quantize_rows)
    plain = output_error(np.ones(128, np.float32), weight, rows, maximum, *functions)
    assert output_error(factors, weight, rows, maximum, *functions) < plain / gain
    assert np.exp(np.log(np.delete(factors, [11, 12])).mean()) == pytest.approx(1, rel=1e-5)
    assert (factors[[11, 12]] == 1).all()
    assert (factors == rescaling(weight, maximum, rows, *functions)).all()
    # No other exponents on the grid are better.
    sizes = maximum if quantize_rows else np.sqrt(np.square(rows).mean(axis=0))
    largest = np.abs(weight).max(axis=1)
    errors = []
    for up, down in MIGRATIONS:
        if quantize_rows is not None and up > MOST_MIGRATION:
            continue
        own = np.ones(128, np.float32)
        used = np.delete(np.arange(128), [11, 12])
        own[used] = sizes[used] ** up / largest[used] ** down
        own[used] /= np.exp(np.log(own[used]).mean())
        errors.append(output_error(own, weight, rows, maximum, *functions))
    assert output_error(factors, weight, rows, maximum, *functions) == pytest.approx(min(errors), rel=1e-2)


def test_what_cannot_improve_keeps_its_scale() -> None:
    weight, rows, maximum = layer()
    assert (rescaling(weight, maximum, rows, same_weight) == 1).all()
    zeros = np.zeros_like(rows)
    assert (rescaling(weight, zeros.max(axis=0), zeros, int8_weight, int8_rows) == 1).all()


def test_factors_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_export.export.quantize.rescaling.MIGRATIONS", ((1.0, 0.0),))
    weight, rows, _maximum = layer()
    rows[:, 0] *= 1e8
    rows[:, 1] /= 1e8
    monkeypatch.setattr("sana_export.export.quantize.rescaling.MOST_MIGRATION", 1.0)
    factors = rescaling(weight, np.abs(rows).max(axis=0), rows, int8_weight, int8_rows)
    assert (factors[0], factors[1]) == (MOST, LEAST)


def test_many_rows_and_columns_are_thinned_out() -> None:
    weight, rows, maximum = layer()
    seen = []

    def watch(part: np.ndarray) -> np.ndarray:
        seen.append(part.shape)
        return int4_weight(part)

    wide = np.tile(weight, (1, 40))
    factors = rescaling(wide, maximum, np.tile(rows, (4, 1)), watch)
    assert set(seen) == {(128, 854)}
    assert output_error(factors, weight, rows, maximum, int4_weight, None) < output_error(
        np.ones(128, np.float32), weight, rows, maximum, int4_weight, None
    )
