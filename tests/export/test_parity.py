"""The measures of parity, and comparisons that just pass or just fail."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sana_export.export.parity import compare_images, compare_tensors, cosine, psnr


def test_measures():
    a, b = np.array([3.0, 4.0]), np.array([4.0, 3.0])
    assert cosine(a, b) == pytest.approx(24 / 25)
    assert psnr(a, b, peak=2.0) == pytest.approx(10 * math.log10(4))
    assert psnr(a, a) == math.inf
    assert cosine(np.zeros(3), np.zeros(3)) == 1.0
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


def test_tensors_pass_and_fail():
    wanted = np.random.default_rng().standard_normal((4, 5))
    assert compare_tensors("x", wanted, wanted, "fp32").passed
    assert not compare_tensors("x", wanted + 0.01 * wanted[::-1], wanted, "fp32").passed
    assert compare_tensors("x", wanted + 0.001 * wanted[::-1], wanted, "fp16").passed
    broken = wanted.copy()
    broken[0, 0] = np.nan
    assert not compare_tensors("x", broken, wanted, "fp16").passed


def test_float32_images_may_differ_by_one_level_in_one_value_of_a_thousand():
    wanted = np.random.default_rng().integers(1, 254, (1, 100, 100, 1), dtype=np.uint8)

    def changed(count, levels):
        found = wanted.copy()
        found.reshape(-1)[:count] += np.uint8(levels)
        return compare_images("x", found, wanted, "fp32")

    assert changed(10, 1).passed
    assert not changed(11, 1).passed
    assert not changed(1, 2).passed


def test_half_precision_images_need_40_db():
    wanted = np.full((1, 64, 64, 3), 100, dtype=np.uint8)
    assert compare_images("x", wanted + np.uint8(2), wanted, "fp16").passed
    assert not compare_images("x", wanted + np.uint8(3), wanted, "fp16").passed


def test_json_has_no_infinity():
    row = compare_tensors("x", np.ones(3), np.ones(3), "fp32").as_json()
    assert json.loads(json.dumps(row, allow_nan=False))["psnr_db"] == "inf"
