"""Partial images: previews of an image while it is sampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from sana_export.runtime import SanaRuntime


def preview_steps(steps: int, count: int) -> tuple[int, ...]:
    """The steps, from 0, after which previews are made: `count` of them, evenly spread, never after the last step."""
    return tuple(sorted({(index + 1) * steps // (count + 1) - 1 for index in range(count)} - {-1, steps - 1}))


def preview_callback(
    steps: int, count: int, method: str, size: tuple[int, int], show: Callable[[int, Image.Image], None]
) -> Callable[..., None]:
    """A callback of the runtime for one image. It calls `show` with the number of each preview and the preview.

    method: as in `SanaRuntime.preview`. size: width and height that the previews are enlarged to.
    """
    chosen = preview_steps(steps, count)

    def callback(runtime: SanaRuntime, index: int, _timestep: float, _tensors: dict[str, Any]) -> None:
        if index in chosen:
            preview = runtime.preview(method=method)[0]
            show(chosen.index(index), preview.resize(size, Image.Resampling.BICUBIC))

    return callback
