"""Low-rank branches against a singular value decomposition, and their gain."""

from __future__ import annotations

import numpy as np
import pytest

from sana_export.export.quantize.low_rank import low_rank_branch
from sana_export.export.quantize.rounding import round_to_nearest
from sana_export.formats.dtypes import WEIGHT_DTYPES


def layer() -> tuple[np.ndarray, np.ndarray]:
    """A weight [160, 96] with a decaying spectrum, and inputs with outlier channels."""
    random = np.random.default_rng(0)
    left, right = random.standard_normal((160, 40)) * 0.9 ** np.arange(40), random.standard_normal((40, 96))
    weight = left @ right + 0.1 * random.standard_normal((160, 96))
    rows = random.standard_normal((300, 160)) * np.exp(random.standard_normal(160))
    rows[:, :3] *= 30
    return weight.astype(np.float32), rows.astype(np.float32)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("rank", [1, 16])
def test_the_branch_is_the_best_of_its_rank(weighed: bool, rank: int) -> None:
    weight, rows = layer()
    down, up = low_rank_branch(weight, rows if weighed else None, rank)
    assert (down.shape, up.shape) == ((160, rank), (rank, 96))
    assert (down.dtype, up.dtype) == (np.float32, np.float32)
    scale = np.sqrt(np.square(rows).mean(axis=0, dtype=np.float64))[:, None] if weighed else np.ones((160, 1))
    values = np.linalg.svd(scale * weight, compute_uv=False)
    least = np.square(values[rank:]).sum()
    assert np.square(scale * (weight - down @ up)).sum(dtype=np.float64) == pytest.approx(least, rel=1e-3)
    # The leading singular values first, shared by the factors.
    assert np.linalg.norm(up, axis=1) ** 2 == pytest.approx(values[:rank], rel=1e-3)
    assert np.linalg.norm(scale * down, axis=0) ** 2 == pytest.approx(values[:rank], rel=1e-3)


def test_the_signs_are_fixed() -> None:
    weight, rows = layer()
    down, up = low_rank_branch(weight, rows, 8)
    assert (up[np.arange(8), np.abs(up).argmax(axis=1)] > 0).all()
    other_down, other_up = low_rank_branch(-weight, rows, 8)
    assert np.abs(other_up - up).max() < 1e-3 * np.abs(up).max()
    assert np.abs(other_down + down).max() < 1e-3 * np.abs(down).max()


def test_the_rest_has_a_smaller_error_in_4_bits() -> None:
    weight, rows = layer()
    dtype = WEIGHT_DTYPES["float16"]
    errors = {}
    for name, sample in (("none", None), ("plain", None), ("weighed", rows)):
        down, up = low_rank_branch(weight, sample, 16)
        branch = np.zeros_like(weight) if name == "none" else down @ up
        numbers = branch + round_to_nearest(weight - branch, "int4", 0, 32, dtype).numbers
        errors[name] = np.square(rows @ (numbers - weight)).sum()
    assert errors["plain"] < errors["none"] / 2
    assert errors["weighed"] < errors["plain"] / 3


def test_unusual_sizes() -> None:
    weight, rows = layer()
    down, up = low_rank_branch(weight[:, :5], rows, 16)
    assert (down.shape, up.shape) == ((160, 5), (5, 5))
    assert np.abs(down @ up - weight[:, :5]).max() < 1e-4
    rows[:, 7] = 0
    down, up = low_rank_branch(weight, rows, 4)
    assert np.isfinite(down).all()
    down, up = low_rank_branch(np.zeros_like(weight), rows, 4)
    assert not (down @ up).any()
    down, up = low_rank_branch(weight, np.zeros_like(rows), 4)
    assert np.isfinite(down).all()
