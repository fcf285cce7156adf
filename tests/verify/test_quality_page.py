"""The page of `verify --quality --report`: its figures and images, by themselves in a browser."""

from __future__ import annotations

import base64
import importlib
import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sana_export.verify.quality import perceptual
from sana_export.verify.quality.histogram import LEFT, RIGHT, WIDTH, histogram
from sana_export.verify.quality.page import AMPLIFIED, SHOWN, amplified, shown_samples, write_page
from sana_export.verify.quality.result import DIFFUSERS, Drawn, Likeness, Limits, Quality, Sample, Spread

#: Of the images of the bundle, of the other bundle and of diffusers.
LEVELS = (100, 110, 105)
DRAWN = Drawn(20, "fp32", {"denoiser": "int8"}, "onnxruntime")
SPREAD = Spread(31.25, 22.5, 11.75)


def sample(number: int, ratio: float, fault: str | None = None) -> Sample:
    own, base, diffusers = (np.full((32, 48, 3), (level, number, 0), np.uint8) for level in LEVELS)
    return Sample(
        f"<cat> {number} 🐼", 0, number, own, (base, diffusers), (ratio, ratio + 1), (0.9, 0.8), True, (True, True), fault
    )


@pytest.fixture
def quality() -> Quality:
    samples = [sample(number, 20.0 + number) for number in range(30)]
    samples[25] = sample(25, 45.0, "blank: 100% is flat")
    rows = (Likeness("a<b", SPREAD, Spread(0.75, 0.5, 0.25), top1=99.5), Likeness(DIFFUSERS, SPREAD, SPREAD, top1=98.5))
    return Quality("the <bundle>", DRAWN, tuple(samples), rows, Limits(1.0, 30.0), "there is none", 97.5, 100.0, 24.5, 24.75)


def test_the_page_shows_the_figures_and_needs_nothing_else(quality: Quality, tmp_path: Path) -> None:
    path = write_page(quality, tmp_path / "report")
    text = path.read_text("utf-8")
    assert path == tmp_path / "report" / "quality.html"
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]{0,22})|url\(', text)
    assert set(sources) == {"data:image/png;base64,"}
    assert len(sources) == 4 * (SHOWN + 1)
    for words in (
        "31.2 dB",
        "22.5 dB",
        "11.8 dB",
        "0.7500",
        "97.5 %, reference 99.5 %, MISSED",
        "a&lt;b",
        "24.50 dB",
        "there is none",
        "32x48 px, 20 steps, fp32 on onnxruntime, denoiser int8.",
        "27.0 dB against the bundle, 28.0 dB against diffusers",
    ):
        assert words in text, words
    assert "<cat>" not in text.replace("&lt;cat&gt;", "")
    assert "the <bundle>" not in text
    assert "NOT passed" in text
    assert text.count("<svg") == 2
    assert "prefers-color-scheme: dark" in text
    assert text.count("&lt;cat&gt; 7 ") == 2  # in the table and among the worst
    assert text.count("&lt;cat&gt; 17 ") == 1
    passing = replace(quality, top1=99.0, samples=tuple(each for each in quality.samples if each.fault is None))
    assert "All limits are met" in write_page(passing, tmp_path).read_text("utf-8")


def test_the_worst_images_are_side_by_side(quality: Quality, tmp_path: Path) -> None:
    """The one that fails by itself first: diffusers, the other bundle, the bundle, and the amplified difference of those two."""
    shown = shown_samples(quality.samples)
    assert [each.place for each in shown] == [25, *range(SHOWN)]
    text = write_page(quality, tmp_path).read_text("utf-8")
    encoded = re.findall(r"data:image/png;base64,([^\"]+)", text)[:4]
    pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in encoded]
    assert [tuple(image[0, 0]) for image in pixels] == [(105, 25, 0), (110, 25, 0), (100, 25, 0), (10 * AMPLIFIED, 0, 0)]
    assert {image.shape for image in pixels} == {(32, 48, 3)}


def test_a_difference_is_amplified_and_clipped() -> None:
    image, reference = np.array([[[0, 10, 255]]], np.uint8), np.array([[[200, 12, 250]]], np.uint8)
    assert amplified(image, reference).tolist() == [[[255, 2 * AMPLIFIED, 5 * AMPLIFIED]]]


def test_bars_have_the_counts_of_the_values() -> None:
    """From 30 to 51 dB in steps of 1: heights and places follow the values, and the limit has its place on the same axis."""
    values = [30.0, 30.4, 35.9, 50.0]
    drawn = histogram(values, [values, [40.0]], 32.0, "first")
    titles = re.findall(r"<title>(\d+) images from ([\d.]+) to ([\d.]+) dB", drawn)
    assert titles == [("2", "30", "31"), ("1", "35", "36"), ("1", "50", "51")]
    across = (WIDTH - LEFT - RIGHT) / 21
    places = [float(x) for x in re.findall(r'<rect class="first" x="([\d.]+)"', drawn)]
    assert places == pytest.approx([LEFT + 1 + number * across for number in (0, 5, 20)], abs=0.1)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', drawn)]
    assert heights == pytest.approx([2 * heights[1], heights[1], heights[1]], abs=0.2)
    limit = re.search(r'class="limit" x1="([\d.]+)"', drawn)
    assert limit is not None
    assert float(limit[1]) == pytest.approx(LEFT + 2 * across, abs=0.1)


def test_equal_images_and_failed_ones_are_in_the_outer_bars() -> None:
    values = [float("inf"), 120.0, 100.0, 50.0, -float("inf")]
    drawn = histogram(values, [values], None, "first")
    assert re.findall(r"<title>(\d+) images from ([\d.]+) to", drawn) == [("1", "0"), ("1", "48"), ("3", "100")]
    assert 'class="limit"' not in drawn


def test_lpips_is_measured_only_with_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: the mean absolute difference of values in [-1, 1]."""

    class Network(torch.nn.Module):
        def forward(self, image: Any, reference: Any) -> Any:
            assert image.shape == (1, 3, 2, 2)
            return (image - reference).abs().mean().reshape(1, 1, 1, 1)

    monkeypatch.setattr(perceptual, "PACKAGES", ("no_such_package", "no_such_either"))
    assert perceptual.find() == (None, "no_such_package and no_such_either are not installed")
    monkeypatch.setattr(perceptual, "PACKAGES", ("json",))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / perceptual.WEIGHTS
    assert perceptual.find() == (None, f"there is no {path}, and weights are not downloaded here")
    path.parent.mkdir()
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=lambda net, verbose: Network()))
    distance, missing = importlib.import_module(perceptual.__name__).find()
    assert missing is None
    white, gray = np.full((2, 2, 3), 255, np.uint8), np.full((2, 2, 3), 204, np.uint8)
    assert distance(white, gray) == pytest.approx(0.4)
    assert distance(white, white) == 0.0
