"""Blank and saturated images are found, wherever they are planted, and real images are not mistaken for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

import sana_export
from sana_export.verify.quality.faults import blank_share, image_fault, saturated_share
from sana_export.verify.quality.meter import Meter

TINY = Path(sana_export.__file__).parent / "models" / "tiny"
Edit = Callable[[Any], Any]


@pytest.fixture(scope="module")
def renders() -> Any:
    """Half of the real images of the meter, most of them on white or in one color around the object."""
    meter = Meter.find(TINY)
    assert meter is not None
    return meter.renders[::2]


def with_half(level: int, axis: int) -> Edit:
    """Half of the image in one color."""

    def edit(image: Any) -> Any:
        edited = image.copy()
        np.moveaxis(edited, axis, 0)[: image.shape[axis] // 2] = level
        return edited

    return edit


def noisy(image: Any, size: float = 3.0) -> Any:
    noise = np.random.default_rng(0).normal(0, size, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


def blurred(image: Any) -> Any:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(4)))


def contrast(factor: float) -> Edit:
    return lambda image: ((image.astype(float) - 127.5) * factor + 127.5).clip(0, 255).astype(np.uint8)


def brighter(levels: int) -> Edit:
    return lambda image: (image.astype(int) + levels).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "blank",
    [
        lambda image: np.full_like(image, 0),
        lambda image: np.full_like(image, 255),
        lambda image: np.full_like(image, image.mean(axis=(0, 1)).astype(np.uint8)),
        lambda image: noisy(np.full_like(image, 128), 0.7),
    ],
    ids=["black", "white", "its mean color", "gray with noise"],
)
def test_a_blank_image_is_always_found(renders: Any, blank: Edit) -> None:
    for image in renders:
        assert "blank" in str(image_fault(blank(image), image))


@pytest.mark.parametrize("half", [with_half(0, 0), with_half(255, 1), with_half(128, 1)], ids=["top", "left", "gray left"])
def test_a_half_blank_image_is_found(renders: Any, half: Edit) -> None:
    for image in renders:
        assert "blank: 100%" in str(image_fault(half(image), image))
    full = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert blank_share(half(full), full) == 1.0


def test_a_saturated_image_is_always_found(renders: Any) -> None:
    for image in renders:
        assert image_fault(np.where(image > 127, 255, 0).astype(np.uint8), image) is not None
        assert saturated_share(np.where(image > 127, 255, 0).astype(np.uint8), image) == 1.0


def test_saturation_counts_what_the_reference_has_between() -> None:
    """A quarter of the reference is white. Of the other values, the image clips 16 of 48."""
    reference = np.full((8, 8, 3), 128, np.uint8)
    reference[:2] = 250
    image = reference.copy()
    image[:2] = 255
    image[2:4] = 0
    assert saturated_share(image, reference) == pytest.approx(16 / 48)
    image[2:6] = 0
    assert saturated_share(image, reference) == pytest.approx(32 / 48)
    assert saturated_share(reference, reference) == 0.0
    assert saturated_share(image, np.full_like(image, 255)) == 0.0


@pytest.mark.parametrize(
    "edit",
    [
        lambda image: image,
        noisy,
        blurred,
        contrast(0.5),
        contrast(1.2),
        brighter(20),
        brighter(-20),
        lambda image: np.roll(image, 8, axis=1),
        lambda image: 255 - image,
    ],
    ids=["equal", "noise", "blur", "half the contrast", "more contrast", "brighter", "darker", "moved", "negative"],
)
def test_real_images_are_no_false_alarm(renders: Any, edit: Edit) -> None:
    """White and flat backgrounds included, and with more change than quantization causes."""
    assert [fault for image in renders if (fault := image_fault(edit(image), image))] == []


def test_another_real_image_is_not_blank(renders: Any) -> None:
    """An image that shows something else is wrong, but for the classifier and for PSNR to say."""
    assert max(blank_share(image, other) for image, other in zip(renders, np.roll(renders, 1, axis=0), strict=True)) < 0.75


def test_a_reference_that_is_blank_itself_is_no_fault() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    assert image_fault(white, white) is None
    assert image_fault(white, noisy(white, 1.0)) is None
    faint = np.linspace(100, 115, 64).astype(np.uint8)[:, None, None].repeat(64, 1).repeat(3, 2)  # no tile shows anything
    assert blank_share(np.full_like(faint, 107), faint) == 1.0
    assert image_fault(faint, faint) is None
