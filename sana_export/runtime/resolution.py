"""Image sizes: the bin that a request is sampled in, and the tables that bring the image to the requested size.

Equivalent to `classify_height_width_bin` and `resize_and_crop_tensor` of diffusers' `PixArtImageProcessor` (image_processor.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32, Index
from sana_export.resolutions import BINS, Size

_NO_BINNING = "use_resolution_binning=False (--no-resolution-binning)"


@dataclass(frozen=True, eq=False)
class ResizePlan:
    """A bilinear resize and center crop. Each output pixel is a weighted sum over two rows and two columns of the image:

        out[y, x] = sum over a, b of
            row_weight[a, y] * column_weight[b, x] * image[row_index[a, y], column_index[b, x]]

    Without a resize the weights are exactly 1 and 0. The fields are the inputs of the `postprocess` graph (contract.py).
    """

    #: int64 [2, H_out].
    row_index: Index
    #: float32 [2, H_out].
    row_weight: Float32
    #: int64 [2, W_out].
    column_index: Index
    #: float32 [2, W_out].
    column_weight: Float32


def choose_bin(height: int, width: int, sample_size: int) -> Size:
    """The trained (height, width) with the nearest aspect ratio. Of two equally near ones it is the first, as in diffusers.

    `sample_size` is that of the checkpoint's transformer config. Raises UsageError if it has no table of bins, or if a side is
    below one pixel.
    """
    _check_positive(height, width)
    bins = BINS.get(sample_size)
    if bins is None:
        raise UsageError(
            "resolution binning is not possible with this checkpoint",
            found=f"sample_size {sample_size}",
            wanted="a sample_size with a table of bins: " + ", ".join(map(str, BINS)),
            fix=f"sample at the exact size: {_NO_BINNING}",
        )
    ratio = height / width
    return bins[min(bins, key=lambda candidate: abs(candidate - ratio))]


def check_size(height: int, width: int, factor: int) -> None:
    """Raise UsageError, naming the nearest sizes that work, unless height and width are multiples of `factor`.

    `factor` is the number of image pixels per latent pixel in each direction (`ModelInfo.vae_scale_factor`).
    """
    _check_positive(height, width)
    if height % factor == 0 and width % factor == 0:
        return
    near = [f"{h}x{w}" for h in _nearest(height, factor) for w in _nearest(width, factor)]
    raise UsageError(
        f"height and width must be multiples of {factor} without resolution binning",
        found=f"{height}x{width} (height x width)",
        wanted="for example " + " or ".join(near),
        fix="use one of these sizes",
    )


def make_resize_plan(height: int, width: int, output_height: int, output_width: int) -> ResizePlan:
    """The plan that scales an image of `height` x `width` until it covers the output, and then crops to the center.

    diffusers rounds the scaled size down. Float64 rounding can make it one pixel smaller than the output (256x944 from the bin
    512x1856: int(1856 * (944 / 1856)) is 943), and the crop then leaves an image one pixel wide or high. This function scales to at
    least the size of the output.
    """
    _check_positive(height, width)
    _check_positive(output_height, output_width)
    ratio = max(output_height / height, output_width / width)
    row_index, row_weight = _axis(height, max(int(height * ratio), output_height), output_height)
    column_index, column_weight = _axis(width, max(int(width * ratio), output_width), output_width)
    return ResizePlan(row_index, row_weight, column_index, column_weight)


def _axis(size: int, resized: int, output: int) -> tuple[Index, Float32]:
    """Indices [2, output] and weights [2, output] that resize `size` pixels to `resized` and keep the `output` in the center.

    As torch's `interpolate` (bilinear, align_corners False): pixel i is at (i + 0.5) * size / resized - 0.5, but not before the
    first pixel; the pixel after the last one is the last one. The roundings are torch's: size / resized to float32, then a fused
    multiply-add.
    """
    pixels = np.arange(output, dtype=np.float32) + np.float32((resized - output) // 2)
    scale = np.float32(size) / np.float32(resized)
    position = np.maximum((scale.astype(np.float64) * (pixels + np.float32(0.5)) - 0.5).astype(np.float32), 0)
    before = np.minimum(position.astype(np.int64), size - 1)
    weight = np.clip(position - before.astype(np.float32), 0, 1)
    index = np.stack([before, np.minimum(before + 1, size - 1)])
    return index, np.stack([1 - weight, weight])


def _check_positive(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise UsageError("height and width must be positive", found=f"{height}x{width} (height x width)", wanted="1x1 or more")


def _nearest(size: int, factor: int) -> list[int]:
    """The multiples of `factor` nearest to `size`: itself, or the one below (unless it is 0) and the one above."""
    below = size // factor * factor
    return [below] if below == size else [around for around in (below, below + factor) if around]
