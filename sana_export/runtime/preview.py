"""Small images of latents while they are sampled: a linear projection to RGB, or the decoder.

The projection [C + 1, 3] is fitted by least squares to the bundle's own decoder: random latents are decoded, each square of
`vae_scale_factor` pixels is averaged, and regressed on the latent pixel that it lies over. So it suits every autoencoder, and the
same bundle and backend always give the same projection. It knows nothing of a pixel's neighbors, and shows colors and composition,
not details.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.numeric import MAX_IMAGES, MAX_SIDE
from sana_export.runtime.inputs import check_choice, checked_array
from sana_export.runtime.noise import TorchGenerator
from sana_export.runtime.plan import Plan
from sana_export.runtime.request import Request

if TYPE_CHECKING:
    from sana_export.runtime.pipeline import SanaRuntime

METHODS = ("linear", "decoder")
#: Height and width in latent pixels of the random latents that the projection is fitted to, if the backend's engines take them.
FIT_SIDE = 8
#: The number of the latents, at that size: the more, the closer the fit to that of the model's own images.
FIT_IMAGES = 4
#: Keeps the fit from following the noise of few samples.
_RIDGE = 1e-3


class Previews:
    """Makes previews, and keeps the projection of one runtime. It does not keep the runtime, which would keep its memory."""

    def __init__(self) -> None:
        self._projection: Float32 | None = None

    def show(self, runtime: SanaRuntime, latents: Any, method: str) -> list[Image.Image]:
        """The images of latents [B, C, h, w], an array or a tensor on the device."""
        check_choice("method", method, METHODS)
        host = _on_host(runtime, latents)
        if method == "decoder":
            return list(runtime.decode(_plan(runtime, *host.shape), host))
        if self._projection is None:
            self._projection = _fit(runtime, host.shape)
        return [Image.fromarray(pixels) for pixels in project(host, self._projection)]


def project(latents: Float32, projection: Float32) -> npt.NDArray[np.uint8]:
    """Latents [B, C, h, w] to pixels [B, h, w, 3]."""
    colors = latents.transpose(0, 2, 3, 1) @ projection[:-1] + projection[-1]
    pixels: npt.NDArray[np.uint8] = np.round((colors * 0.5 + 0.5).clip(0, 1) * 255).astype(np.uint8)
    return pixels


def fit_projection(decode: Callable[[Float32], Float32], shape: tuple[int, ...], count: int) -> Float32:
    """The projection [C + 1, 3], float32, whose last row is the constant.

    decode: from latents of `shape`, [1, C, h, w], to the image float32 [1, 3, H, W] in about [-1, 1].
    count: the number of latents to decode.
    """
    generator, (channels, height, width) = TorchGenerator(0), shape[1:]
    inputs, outputs = [], []
    for _ in range(count):
        latents = generator.randn(shape)
        image = decode(latents)
        squares = image.reshape(3, height, image.shape[2] // height, width, image.shape[3] // width)
        inputs.append(latents.transpose(0, 2, 3, 1).reshape(-1, channels))
        outputs.append(squares.mean((2, 4)).reshape(3, -1).T)
    x, y = np.concatenate(inputs).astype(np.float64), np.concatenate(outputs).astype(np.float64)
    x = np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    projection = np.linalg.solve(x.T @ x + _RIDGE * len(x) * np.eye(channels + 1), x.T @ y)
    return np.ascontiguousarray(projection, dtype=np.float32)


def _fit(runtime: SanaRuntime, shape: tuple[int, ...]) -> Float32:
    """The projection for the decoder of `runtime`, which can decode latents of `shape`."""
    try:
        plan, count = _plan(runtime, 1, shape[1], FIT_SIDE, FIT_SIDE), FIT_IMAGES
    except UsageError:  # engines for other sizes
        plan, count = _plan(runtime, 1, *shape[1:]), 1
    return fit_projection(lambda latents: runtime.to_host(runtime.decode_raw(plan, latents)), plan.latents_shape, count)


def _on_host(runtime: SanaRuntime, latents: Any) -> Float32:
    """The latents on the host. Raises UsageError unless they are finite and have the checkpoint's channels."""
    channels = runtime.manifest.model.latent_channels
    wanted = f"latents [images, {channels}, height, width]"
    if latents is None:
        raise UsageError("preview() has nothing to show", found="no latents, outside a callback", wanted=wanted)
    of_backend = type(runtime.backend.to_device(np.zeros(1, dtype=np.float32)))
    host = checked_array("latents", runtime.to_host(latents) if isinstance(latents, of_backend) else latents, wanted)
    fits = host.ndim == 4 and host.shape[1] == channels and all(0 < side <= MAX_SIDE for side in host.shape)
    if not fits or len(host) > MAX_IMAGES:
        raise UsageError("these latents cannot be shown", found=host.shape, wanted=wanted)
    return host


def _plan(runtime: SanaRuntime, count: int, channels: int, height: int, width: int) -> Plan:
    """A plan whose latents have this shape."""
    factor = runtime.manifest.model.vae_scale_factor
    return runtime.plan(
        Request(
            prompt="",
            num_images_per_prompt=count,
            seed=0,
            guidance_scale=1.0,
            height=height * factor,
            width=width * factor,
            use_resolution_binning=False,
        )
    )
