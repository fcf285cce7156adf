"""Latents to images, in one piece or in tiles.

Only the last stages of the decoder run in tiles (`vae_decoder_tail`): they are convolutions of finite reach. The stages that attend
to the whole image run before, in one piece (`vae_decoder_head`). A pixel depends on the features within the tail's halo. So a pixel
that is at least the halo away from every inner side of its window has the same value as in one piece (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image

from sana_export.commands import ranges_command
from sana_export.errors import ArtifactError, UsageError
from sana_export.formats.arrays import Array, Float32, Index
from sana_export.runtime.backends.base import Backend, DeviceTensor
from sana_export.runtime.plan import Plan
from sana_export.runtime.resolution import ResizePlan
from sana_export.runtime.results import Images
from sana_export.runtime.sessions import Sessions


@dataclass(frozen=True)
class Span:
    """One axis of a window, in features."""

    #: First feature that the window reads.
    start: int
    #: The feature after the last one that it reads.
    stop: int
    #: First feature whose pixels are used.
    first: int
    #: The feature after the last one whose pixels are used.
    last: int

    @property
    def index(self) -> Index:
        """The features that the window reads, as an input of `vae_decoder_tail`."""
        return np.arange(self.start, self.stop, dtype=np.int64)

    def source(self, scale: int) -> slice:
        """The used pixels, counted in the decoded window."""
        return slice((self.first - self.start) * scale, (self.last - self.start) * scale)

    def target(self, scale: int) -> slice:
        """The used pixels, counted in the image."""
        return slice(self.first * scale, self.last * scale)


@dataclass(frozen=True)
class Window:
    """A part of the features that is decoded at a time."""

    rows: Span
    columns: Span


def plan_windows(height: int, width: int, tile: int, halo: int) -> tuple[Window, ...]:
    """The windows over `height` x `width` features. Their used parts cover every feature once.

    All windows have the same size, `tile` + 2 `halo`, or the side of the image if that is shorter. On each side a window reads
    `halo` features beyond its used part, or up to the end of the image.
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
    """The windows along one axis. Each begins as late as the halo of the one before allows."""
    length = min(tile + 2 * halo, size)
    spans: list[Span] = []
    first = 0
    while first < size:
        start = min(max(first - halo, 0), size - length)
        last = size if start + length == size else start + length - halo
        spans.append(Span(start, start + length, first, last))
        first = last
    return spans


def check_latents_shape(latents: DeviceTensor | Array, plan: Plan) -> None:
    """Raise UsageError if `latents` have another shape than the plan's. Tensors that do not know their shape pass."""
    shape = getattr(latents, "shape", None)
    shape = shape() if callable(shape) else shape
    if shape is not None and tuple(shape) != plan.latents_shape:
        raise UsageError(
            "these latents have the wrong shape for the plan",
            found=tuple(shape),
            wanted=f"{plan.latents_shape} (images, channels, and the sampled height and width in latent pixels)",
        )


def decode_latents(
    plan: Plan,
    latents: DeviceTensor | Array,
    backend: Backend,
    sessions: Sessions,
    before_tile: Callable[[], None] = lambda: None,
) -> DeviceTensor | Float32:
    """Latents [B, C, h, w] to the decoder's image float32 [B, 3, H, W] in about [-1, 1], in one piece or in tiles as planned.

    The features stay on the device. Tiles are assembled on the host. `before_tile` is called before each; it may raise an error.
    """
    if not plan.decoder_tile:
        return sessions["vae_decoder"].run({"latents": latents})["image"]
    model = backend.manifest.model
    features = sessions["vae_decoder_head"].run({"latents": latents})["features"]

    def render(rows: Index, columns: Index) -> Float32:
        before_tile()
        feeds = {"features": features, "row_index": rows, "column_index": columns}
        tile: Float32 = backend.to_host(sessions["vae_decoder_tail"].run(feeds)["image"])
        return tile

    batch, _, *size = plan.latents_shape
    height, width = (side * model.vae_scale_factor for side in size)
    scale = model.decoder_tile_scale
    windows = plan_windows(height // scale, width // scale, plan.decoder_tile // scale, model.decoder_tile_halo)
    return assemble(render, windows, np.empty((batch, 3, height, width), np.float32), scale)


def one_by_one(latents: Array, decode: Callable[[Array], Images]) -> Images:
    """Decode each of the latents [B, C, h, w] alone.

    The decoder's memory is then that of one image, and an image does not depend on its batch: convolutions of ONNX Runtime in fp16
    round differently for another number of images. At Sana's sizes one image keeps a GPU busy.
    """
    images = [decode(latents[index : index + 1]) for index in range(len(latents))]
    if isinstance(images[0], np.ndarray):
        return np.concatenate([np.asarray(image) for image in images])
    return [image for own in images for image in own]


def finish_images(plan: Plan, image: DeviceTensor | Array, backend: Backend, sessions: Sessions) -> Images:
    """The decoder's image [B, 3, H, W] to images of the plan's size and output type."""
    if plan.output_type == "np":
        host = backend.to_host(image)
        check_finite(host, "an image", backend)
        resized = _resize(host, plan.resize)
        return np.ascontiguousarray((resized * 0.5 + 0.5).clip(0, 1).transpose(0, 2, 3, 1))
    # Not if the image would have to be copied from a GPU only for this. Tiles are on the host already.
    if backend.device == "cpu" or plan.decoder_tile:
        check_finite(backend.to_host(image), "an image", backend)
    pixels = sessions["postprocess"].run({"image": image, **vars(plan.resize)})["pixels"]
    return [Image.fromarray(array) for array in np.array(backend.to_host(pixels))]


def check_finite(values: Array, what: str, backend: Backend) -> None:
    """Raise ArtifactError if `values` contain NaN or infinity. `what` names them in the message."""
    if bad := int(np.count_nonzero(~np.isfinite(values))):
        manifest = backend.manifest
        raise ArtifactError(
            f"sampling with {backend.bundle} gave {what} with NaN or infinite values",
            found=f"{bad} of {values.size} values, with {manifest.options.precision} graphs on the backend {backend.name}",
            wanted="finite values",
            fix=f"{ranges_command(backend.bundle, manifest)} (shows which tensor leaves the range of the precision)",
        )


def _resize(image: Array, plan: ResizePlan) -> Array:
    """The resampling of the `postprocess` graph, on the host: float32 [B, 3, H, W] to [B, 3, H', W']."""
    (top, bottom), (left, right) = plan.row_weight[..., None], plan.column_weight
    rows = image[:, :, plan.row_index[0]] * top + image[:, :, plan.row_index[1]] * bottom
    resized: Array = rows[..., plan.column_index[0]] * left + rows[..., plan.column_index[1]] * right
    return resized
