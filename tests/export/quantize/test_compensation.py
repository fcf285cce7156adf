"""Compensated rounding against a direct solution for each input, and its gain on rows that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from sana_export.export.quantize.compensation import (
    BATCH,
    inverse_factor,
    round_with_compensation,
    second_moments,
)
from sana_export.export.quantize.rounding import round_to_nearest, round_with_search
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import spread

MODULE = "sana_export.export.quantize.compensation"
DTYPE = WEIGHT_DTYPES["float16"]
DAMPING = 0.1
SCHEMES = [(4, 32), (4, 0), (8, 0)]


def layer(inputs: int, outputs: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight, and two samples of correlated inputs with outlier channels. Input 3 is always zero in the first one."""
    random = np.random.default_rng(inputs)
    weight = random.standard_t(5, (inputs, outputs)).astype(np.float32)
    mixing = random.standard_normal((inputs // 2, inputs)) * np.exp(0.5 * random.standard_normal(inputs))
    mixing[:, :4] *= 20
    noise = 0.3 * np.abs(mixing).mean(axis=0)
    samples = [
        random.standard_normal((count, inputs // 2)) @ mixing + noise * random.standard_normal((count, inputs)) for _ in range(2)
    ]
    samples[0][:, 3] = 0
    rows, fresh = (sample.astype(np.float32) for sample in samples)
    return weight, rows, fresh


def error(weight: np.ndarray, numbers: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The squared error of each output channel."""
    return np.square(rows.astype(np.float64) @ (numbers - weight)).sum(axis=0)


def solved(weight: np.ndarray, moments: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The integers, if after every input the later ones minimize the error anew (arXiv 2208.11580). [in, out]"""
    order = np.argsort(-moments.diagonal(), kind="stable")
    rest, most = weight.astype(np.float64), 2 ** (bits - 1) - 1
    values = np.empty(weight.shape)
    for place, index in enumerate(order):
        values[index] = np.rint(rest[index] / scales[index]).clip(-most, most)
        change = values[index] * scales[index] - rest[index]
        later = order[place + 1 :]
        if len(later):
            rest[later] -= np.outer(np.linalg.solve(moments[np.ix_(later, later)], moments[later, index]), change)
    return values


@pytest.mark.parametrize(("bits", "block"), SCHEMES)
def test_the_later_inputs_minimize_the_error(bits: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{MODULE}.DAMPINGS", (DAMPING,))
    monkeypatch.setattr(f"{MODULE}._COLUMNS", 16)  # several pieces, the last one shorter
    weight, rows, _ = layer(3 * BATCH // 2, 40, 500)
    rounded = round_with_compensation(weight, rows, f"int{bits}", block, DTYPE)
    moments = second_moments(rows)
    np.fill_diagonal(moments, np.where(moments.diagonal() > 0, moments.diagonal() * (1 + DAMPING), 1.0))
    scales = spread(DTYPE.widen(rounded.scales), 2, 0 if block else 1, block) * np.ones_like(weight)
    wanted = solved(weight, moments, scales, bits)
    assert (rounded.numbers == rounded.values * scales).all()
    # Rounding of float32 decides a few ties the other way, and a different integer changes what follows in its channel.
    assert (rounded.values == wanted).mean() > 0.99
    nearest = round_to_nearest(weight, f"int{bits}", 0 if block else 1, block, DTYPE)
    assert (nearest.values == wanted).mean() < 0.9


@pytest.mark.parametrize(("bits", "block"), SCHEMES)
def test_the_error_on_unseen_rows_falls(bits: int, block: int) -> None:
    weight, rows, fresh = layer(256, 128, 1024)
    fresh[:, 3] = 0
    axis = 0 if block else 1
    compensated = error(weight, round_with_compensation(weight, rows, f"int{bits}", block, DTYPE).numbers, fresh).sum()
    nearest = error(weight, round_to_nearest(weight, f"int{bits}", axis, block, DTYPE).numbers, fresh).sum()
    searched = error(
        weight, round_with_search(weight, f"int{bits}", axis, block, DTYPE, np.square(rows).mean(axis=0)).numbers, fresh
    ).sum()
    assert compensated < nearest / 6
    assert compensated < searched / 2.5


@pytest.mark.parametrize(("bits", "block"), SCHEMES)
def test_no_output_channel_is_worse_than_rounded_to_nearest(bits: int, block: int) -> None:
    """With fewer rows than inputs, and independent ones, there is little to gain."""
    random = np.random.default_rng(5)
    weight, rows = random.standard_normal((128, 300)).astype(np.float32), random.standard_normal((16, 128)).astype(np.float32)
    nearest = error(weight, round_to_nearest(weight, f"int{bits}", 0 if block else 1, block, DTYPE).numbers, rows)
    compensated = error(weight, round_with_compensation(weight, rows, f"int{bits}", block, DTYPE).numbers, rows)
    assert (compensated <= nearest * (1 + 1e-5)).all()


def test_an_output_channel_that_gets_worse_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows, _ = layer(64, 30, 200)
    monkeypatch.setattr(f"{MODULE}.search_scales", lambda *_: np.full((2, 30), 1e3, np.float16))
    nearest = round_to_nearest(weight, "int4", 0, 32, DTYPE)
    rounded = round_with_compensation(weight, rows, "int4", 32, DTYPE)
    assert (rounded.values == nearest.values).all()
    assert (rounded.scales == nearest.scales).all()
    assert (rounded.numbers == nearest.numbers).all()


@pytest.mark.parametrize(("bits", "block"), SCHEMES)
def test_the_last_rows_choose_the_damping(bits: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the last rows are like the others, little damping is best. If the correlations were chance, much damping is."""
    weight, rows, fresh = layer(128, 64, 1024)
    fresh[:, 3] = 0
    random = np.random.default_rng(6)
    shuffled = np.stack([random.permutation(column) for column in fresh.T], axis=1)
    errors: dict[float, dict[str, float]] = {}
    samples = {"alike": np.concatenate([rows, fresh[:340]]), "chance": np.concatenate([rows, shuffled[:340]])}
    for damping in (0.1, 10.0):
        monkeypatch.setattr(f"{MODULE}.DAMPINGS", (damping,))
        errors[damping] = {
            kind: error(
                weight, round_with_compensation(weight, sample[:1024], f"int{bits}", block, DTYPE).numbers, sample[1024:]
            ).sum()
            for kind, sample in samples.items()
        }
    assert errors[0.1]["alike"] < errors[10.0]["alike"]
    assert errors[10.0]["chance"] < errors[0.1]["chance"]
    for kind, damping in (("alike", 0.1), ("chance", 10.0)):
        monkeypatch.setattr(f"{MODULE}.DAMPINGS", (damping,))
        wanted = round_with_compensation(weight, samples[kind], f"int{bits}", block, DTYPE)
        monkeypatch.setattr(f"{MODULE}.DAMPINGS", (0.1, 10.0))
        assert (round_with_compensation(weight, samples[kind], f"int{bits}", block, DTYPE).values == wanted.values).all(), kind


def test_inputs_that_the_sample_does_not_show_are_rounded_to_nearest() -> None:
    weight, rows, _ = layer(64, 30, 200)
    rounded = round_with_compensation(weight, rows, "int8", 0, DTYPE)
    assert np.abs(rounded.numbers[3] - weight[3]).max() <= DTYPE.widen(rounded.scales).max() * 0.501
    silent = round_with_compensation(weight, np.zeros_like(rows), "int8", 0, DTYPE)
    assert (np.abs(silent.numbers - weight) <= DTYPE.widen(silent.scales) * 0.501).mean() > 0.99


def test_the_factor_is_that_of_the_inverse() -> None:
    _, rows, _ = layer(200, 4, 500)
    moments = second_moments(rows)
    assert np.abs(moments - rows.astype(np.float64).T @ rows / len(rows)).max() <= 1e-9 * moments.max()
    damped = moments.copy()
    np.fill_diagonal(damped, np.where(moments.diagonal() > 0, moments.diagonal() * (1 + DAMPING), 1.0))
    factor = inverse_factor(moments, DAMPING).astype(np.float64)
    assert not np.tril(factor, -1).any()
    root = np.sqrt(damped.diagonal())
    assert np.abs((factor.T @ factor @ damped) * root[:, None] / root - np.eye(200)).max() < 1e-4
