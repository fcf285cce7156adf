"""Images to latents, in one piece or in tiles.

The stages of the encoder before the first attention run on windows of the image (`vae_encoder_head`), the rest on all of their
features (`vae_encoder_tail`). A feature that is at least the head's halo away from every inner side of its window has the same
value as in one piece (docs/numerics.md).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sana_export.formats.arrays import Float32, Index
from sana_export.runtime.backends.base import Backend
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.runtime.sessions import Sessions


def encode_image(
    image: Float32,
    tile: int,
    backend: Backend,
    sessions: Sessions,
    before_tile: Callable[[], None] = lambda: None,
) -> Float32:
    """image float32 [1, 3, H, W] in [-1, 1] -> latents float32 [1, C, h, w], those that the sampler uses, on the host.

    `tile` is the side of a tile in image pixels, 0 for one piece. Features of tiles are assembled on the host. `before_tile` is
    called before each; it may raise an error.
    """
    if not tile:
        return np.array(backend.to_host(sessions["vae_encoder"].run({"image": image})["latents"]))
    model = backend.manifest.model
    scale = model.encoder_tile_scale
    height, width = (side // scale for side in image.shape[2:])

    def render(rows: Index, columns: Index) -> Float32:
        before_tile()
        (top, bottom), (left, right) = ((index[0] * scale, (index[-1] + 1) * scale) for index in (rows, columns))
        window = np.ascontiguousarray(image[:, :, top:bottom, left:right])
        features: Float32 = backend.to_host(sessions["vae_encoder_head"].run({"window": window})["window_features"])
        return features

    channels = backend.manifest.graphs["vae_encoder_tail"].spec.inputs[0].shape[1]
    features = np.empty((image.shape[0], int(channels), height, width), np.float32)
    assemble(render, plan_windows(height, width, tile // scale, model.encoder_tile_halo), features, 1)
    return np.array(backend.to_host(sessions["vae_encoder_tail"].run({"features": features})["latents"]))
