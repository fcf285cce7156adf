"""Measures of parity, and the limits that a graph or an image has to meet."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sana_export.formats.arrays import Array
from sana_export.json_records import json_value
from sana_export.quantization.schemes import SCHEMES

#: Minimum cosine similarity of a graph's output with its reference, by precision.
COSINE_LIMITS = {"fp32": 0.999999, "fp16": 0.9999, "bf16": 0.998}
#: The same for two graphs that round the inputs of their layers, by the bits of these. An error of the last bit moves a value at
#: the border between two steps by a whole step, and half precision has such errors in one of 100 values. A step of FP4 is four
#: times one of FP8: two fp16 graphs of `tiny` had a cosine of 0.987, and each one of 0.984 with the same graph in fp32. Without
#: the rounding, the limits above hold (graph_files.py).
ROUNDED_INPUTS_LIMITS = {
    8: {"fp32": 0.999, "fp16": 0.99, "bf16": 0.98},
    4: {"fp32": 0.999, "fp16": 0.96, "bf16": 0.9},
}
#: Minimum PSNR in dB of an image against the float32 reference, by precision. fp32 images must meet the stricter limits below.
IMAGE_PSNR_LIMITS = {"fp32": 60.0, "fp16": 40.0, "bf16": 25.0}
#: Minimum fraction of identical values in an fp32 image.
IDENTICAL_LIMIT = 0.999
#: Maximum difference of a value in an fp32 image, in levels of 0 to 255.
LEVEL_LIMIT = 1


@dataclass(frozen=True)
class Parity:
    """The result of one comparison."""

    #: What was compared.
    name: str
    #: Largest absolute difference.
    max_abs: float
    #: Cosine similarity.
    cosine: float
    #: Peak signal-to-noise ratio in dB.
    psnr_db: float
    #: The limits that apply, as text.
    limit: str
    #: Whether the limits are met.
    passed: bool
    #: Fraction of identical values. None if it was not measured.
    identical: float | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that have a value, ready for JSON."""
        return {key: json_value(value) for key, value in asdict(self).items() if value is not None}


def compare_tensors(
    name: str, found: Array, wanted: Array, precision: str, scheme: str | None = None, *, input_bits: int = 16
) -> Parity:
    """Compare a graph's output with its reference of the same shape. `scheme`: how it is quantized, unless the reference is too.

    `input_bits`: those that both round the inputs of their layers to; 16: they do not round them.

    Cosine similarity does not see a wrong factor, so the relative error |found - wanted| / |wanted| has a limit too: the error of
    two vectors of equal length at the cosine's limit.
    """
    limit = COSINE_LIMITS[precision] if scheme is None else SCHEMES[scheme].cosine_limit
    limit = min(limit, ROUNDED_INPUTS_LIMITS[input_bits][precision]) if input_bits in ROUNDED_INPUTS_LIMITS else limit
    relative_limit = math.sqrt(2.0 * (1.0 - limit))
    measured, relative = cosine(found, wanted), relative_error(found, wanted)
    passed = bool(np.isfinite(found).all()) and measured >= limit and relative <= relative_limit
    text = f"cosine >= {limit}, relative error <= {relative_limit:.2g}"
    return Parity(name, max_abs(found, wanted), measured, psnr(found, wanted), text, passed)


def compare_images(name: str, found: Array, wanted: Array, precision: str, schemes: Collection[str] = ()) -> Parity:
    """Compare uint8 images [B, H, W, 3] with the reference's. `schemes`: how parts of the bundle are quantized."""
    difference = np.abs(found.astype(np.int16) - wanted.astype(np.int16))
    identical, largest = float((difference == 0).mean()), int(difference.max(initial=0))
    ratio = psnr(found, wanted, peak=255.0)
    if schemes:
        least = min(SCHEMES[scheme].psnr_limit for scheme in schemes)
        limit, passed = f"psnr_db >= {least:g}", ratio >= least
    elif precision == "fp32":
        limit = f"identical >= {IDENTICAL_LIMIT:.1%}, none off by more than {LEVEL_LIMIT} level"
        passed = identical >= IDENTICAL_LIMIT and largest <= LEVEL_LIMIT
    else:
        limit = f"psnr_db >= {IMAGE_PSNR_LIMITS[precision]:g}"
        passed = ratio >= IMAGE_PSNR_LIMITS[precision]
    return Parity(name, float(largest), cosine(found, wanted), ratio, limit, passed, identical)


def max_abs(found: Array, wanted: Array) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    return float(np.abs(found.astype(np.float64) - wanted.astype(np.float64)).max(initial=0.0))


def relative_error(found: Array, wanted: Array) -> float:
    """|found - wanted| / |wanted| in the Euclidean norm; 0 for two tensors of zeros."""
    error, norm = np.linalg.norm(found.astype(np.float64) - wanted), np.linalg.norm(wanted.astype(np.float64))
    return float(error / norm) if norm else float(error)


def cosine(found: Array, wanted: Array) -> float:
    """Cosine similarity of two tensors as vectors; 1 if both are zero, 0 if only one is."""
    a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    norm = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / norm if norm else float(np.array_equal(a, b))


def psnr(found: Array, wanted: Array, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal tensors. `peak` None: the range of the reference's values."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    peak = float(b.max(initial=0.0) - b.min(initial=0.0)) if peak is None else peak
    error = float(np.mean((a - b) ** 2))
    if error == 0.0:
        return math.inf
    return 10.0 * math.log10(peak**2 / error) if peak and math.isfinite(error) else -math.inf


def ssim(found: Array, wanted: Array) -> float:
    """Structural similarity of two uint8 images [H, W, C] with at least 11 pixels per side; 1 for equal images.

    Uses Gaussian windows of 11 pixels with standard deviation 1.5, channel by channel (Wang et al. 2004,
    doi 10.1109/TIP.2003.819861).
    """
    window = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blurred(image: Array) -> Array:
        for axis in (0, 1):
            image = np.lib.stride_tricks.sliding_window_view(image, 11, axis=axis) @ window
        return image

    a, b = found.astype(np.float64), wanted.astype(np.float64)
    mean_a, mean_b = blurred(a), blurred(b)
    variances = blurred(a * a) - mean_a**2 + blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return float(similarity.mean())
