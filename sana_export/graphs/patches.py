"""Runs a layer in patches of its input, one after the other, so that its widest tensors have the size of one patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def _columns(x: Tensor, bands: int) -> int:
    """The number of bands of columns. float32 graphs run on CPUs, which save memory by them.

    TensorRT-RTX 1.7.1 needs more with them: for the decoder's head at 4096 px 2.71 GB in place of 2.30 GB.
    """
    return bands if x.dtype == torch.float32 else 1


@dataclass(frozen=True)
class Patch:
    """One of the equal parts of x [B, C, H, W], with the pixels around it that its layer reads."""

    #: The patch, and on every side that is not a border of x as many more pixels as the layer reads, [B, C, h, w].
    read: Tensor
    #: The rows of `read` that are the patch's own.
    rows: slice
    #: The columns of `read` that are the patch's own.
    columns: slice

    def own(self, values: Tensor) -> Tensor:
        """The patch's own pixels of `values` [..., h, w]."""
        return values[..., self.rows, self.columns]


def in_patches(x: Tensor, bands: int, halo: int, compute: Callable[[Patch], Tensor]) -> Tensor:
    """x [B, C, H, W] with each patch replaced by what `compute` makes of it. See `patches_of`."""
    rows = []
    for band, own in _bands(x, 2, bands, halo):
        rows.append(_joined([compute(Patch(read, own, columns)) for read, columns in _bands(band, 3, _columns(x, bands), halo)], 3))
    return _joined(rows, 2)


def in_bands(x: Tensor, bands: int, halo: int, factor: int, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """`compute` of x [B, C, H, W], in `bands` bands of rows. `compute` reads `halo` rows beyond its own and makes `factor` of each.

    `bands` divides H, and a band has at least `halo` rows.
    """
    if bands == 1:
        return compute(x)
    made = ((compute(read), own) for read, own in _bands(x, 2, bands, halo))
    return _joined([rows[:, :, factor * own.start : factor * own.stop] for rows, own in made], 2)


def patches_of(x: Tensor, bands: int, halo: int) -> Iterator[Patch]:
    """x [B, C, H, W] as `bands` times `bands` patches, row by row; in half precision as `bands` bands. `bands` divides H and W.

    A patch has at least `halo` rows and columns, the number of pixels that the layer reads beyond it.
    """
    for band, rows in _bands(x, 2, bands, halo):
        for read, columns in _bands(band, 3, _columns(x, bands), halo):
            yield Patch(read, rows, columns)


def _bands(x: Tensor, axis: int, count: int, halo: int) -> Iterator[tuple[Tensor, slice]]:
    """x in `count` bands along `axis`: what is read for each, and which part of it is the band's own."""
    if count == 1:
        yield x, slice(None)
        return
    length = x.shape[axis] // count
    for band in range(count):
        before, after = halo * (band > 0), halo * (band < count - 1)
        read = slice(band * length - before, (band + 1) * length + after)
        yield x[(slice(None),) * axis + (read,)], slice(before, before + length)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)
