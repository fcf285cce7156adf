"""Faults of single images that averages hide: an image that is blank, or saturated, although the reference's is not.

Both are measured against the reference, because real images have flat and white areas too.
"""

from __future__ import annotations

import numpy as np

from sana_export.formats.arrays import Array

#: An image is divided into this many tiles along each side.
TILES = 4
#: Contrast, in levels of 0 to 255, from which a tile of the reference shows something. Noise of a flat area stays below.
SHOWS = 8.0
#: The same of a whole image, if too few of its tiles show anything.
FAINT = 2.0
#: A tile is blank if its contrast is below this share of the reference's. Rounding changes contrast by a few percent.
KEPT = 0.125
#: An image is blank if, in one of its halves, this share of the tiles that show something in the reference is blank. Not all, so
#: that a line that remains hides nothing. Two different real images of `tiny` on white come to 0.67 at most.
BLANK_LIMIT = 0.9
#: Tiles that show something that a half needs for that: one alone may be empty because its object has moved.
LEAST_TILES = 2
_HALVES = (np.s_[: TILES // 2], np.s_[TILES // 2 :], np.s_[:, : TILES // 2], np.s_[:, TILES // 2 :])
#: Levels from 0 or 255 within which a value of the reference counts as clipped: white that turns from 250 to 255 is not a fault.
NEAR = 16
#: An image is saturated if this share of the values that are not clipped in the reference is 0 or 255.
SATURATED_LIMIT = 0.5


def image_fault(image: Array, reference: Array) -> str | None:
    """What is wrong with a uint8 image [H, W, 3], compared with a reference of the same shape. None: it has no such fault.

    It is blank if the tiles of one half have lost their contrast, and saturated if too many values are 0 or 255.
    """
    if (blank := blank_share(image, reference)) >= BLANK_LIMIT:
        return f"blank: {blank:.0%} of what the reference shows in one half is a flat color"
    if (saturated := saturated_share(image, reference)) >= SATURATED_LIMIT:
        return f"saturated: {saturated:.0%} of the values that the reference has between 0 and 255 are 0 or 255"
    return None


def blank_share(image: Array, reference: Array) -> float:
    """The share of the reference's tiles with contrast whose contrast the image has lost: the largest of its four halves.

    If too few tiles of the reference show something, the whole image counts as one tile, unless it is as good as blank itself.
    """
    found, wanted = tile_contrasts(image, TILES), tile_contrasts(reference, TILES)
    shows, lost = wanted >= SHOWS, found < KEPT * wanted
    shares = [float(lost[half][shows[half]].mean()) for half in _HALVES if shows[half].sum() >= LEAST_TILES]
    if shares:
        return max(shares)
    found, wanted = tile_contrasts(image, 1), tile_contrasts(reference, 1)
    return float(wanted.item() >= FAINT and found.item() < KEPT * wanted.item())


def tile_contrasts(image: Array, tiles: int) -> Array:
    """Contrasts [tiles, tiles] of an image's tiles: the standard deviation of the values around the mean of their channel."""
    rows = [np.array_split(row, tiles, axis=1) for row in np.array_split(image, tiles, axis=0)]
    return np.array([[np.sqrt(part.astype(np.float64).var(axis=(0, 1)).mean()) for part in row] for row in rows])


def saturated_share(image: Array, reference: Array) -> float:
    """How many of the values that are not clipped in the reference are clipped in the image, as a share of all of the former.

    Only counts matter, not places, so an object that has moved is not a fault. 0 if the image has no more clipped values.
    """
    clipped = float(((image == 0) | (image == 255)).mean())
    expected = float(((reference <= NEAR) | (reference >= 255 - NEAR)).mean())
    return max(clipped - expected, 0.0) / (1 - expected) if expected < 1 else 0.0
