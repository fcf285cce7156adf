"""The windows of a tiled decode, and the image that is put together from them.

Only the last stages of the decoder, convolutions of finite reach, run in tiles (`vae_decoder_tail`); what attends to the whole
image ran before (`vae_decoder_head`). A pixel at least the tail's halo away from those sides of its window that are no sides of the
image sees exactly what it sees in one piece. docs/numerics.md derives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from sana_export.profiles import DECODER_TILE

Float32 = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]

#: Image pixels up to which an image is decoded in one piece where nothing is asked for: every bin of checkpoints up to 2K.
UNTILED_AREA = 2048 * 2048


@dataclass(frozen=True)
class Span:
    """One axis of a window in features: it reads [start, stop); what it decodes is right, and wanted, on [first, last)."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def index(self) -> Index:
        """What the window reads, as an input of `vae_decoder_tail`."""
        return np.arange(self.start, self.stop, dtype=np.int64)

    def source(self, scale: int) -> slice:
        """The wanted part of the decoded window, in image pixels of the window."""
        return slice((self.first - self.start) * scale, (self.last - self.start) * scale)

    def target(self, scale: int) -> slice:
        """Where that goes, in image pixels of the image."""
        return slice(self.first * scale, self.last * scale)


@dataclass(frozen=True)
class Window:
    """A part of the features that is decoded at once, and where its valid part goes."""

    rows: Span
    columns: Span


def choose_tile(asked: int | None, height: int, width: int) -> int:
    """The side of a decoder tile in image pixels for an image of `height` x `width`: 0 is one piece, `asked` None the default."""
    if asked is not None:
        return asked
    return DECODER_TILE if height * width > UNTILED_AREA else 0


def plan_windows(height: int, width: int, tile: int, halo: int) -> tuple[Window, ...]:
    """The windows over `height` x `width` features, all of one size: `tile` + 2 `halo`, or the image's side where that is shorter.

    Their wanted parts cover every feature once. On each side a window reads `halo` more than is wanted, or to the image's end.
    """
    return tuple(Window(rows, columns) for rows, columns in product(_spans(height, tile, halo), _spans(width, tile, halo)))


def assemble(render: Callable[[Index, Index], Float32], windows: Iterable[Window], image: Float32, scale: int) -> Float32:
    """Fill `image` [B, 3, H, W] with `render(row_index, column_index)` [B, 3, h, w] of every window, and return it."""
    for window in windows:
        tile = render(window.rows.index, window.columns.index)
        image[:, :, window.rows.target(scale), window.columns.target(scale)] = tile[
            :, :, window.rows.source(scale), window.columns.source(scale)
        ]
    return image


def _spans(size: int, tile: int, halo: int) -> list[Span]:
    """Windows along one axis, each as far on as the halo of the one before allows."""
    length = min(tile + 2 * halo, size)
    spans: list[Span] = []
    first = 0
    while first < size:
        start = min(max(first - halo, 0), size - length)
        last = size if start + length == size else start + length - halo
        spans.append(Span(start, start + length, first, last))
        first = last
    return spans
