"""Images of one request, drawn with the bundle and with diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sana_export.formats.arrays import Array
from sana_export.runtime import SanaRuntime
from sana_export.runtime.request import Request, bins_resolution
from sana_export.verify.reference import call_reference


@dataclass(frozen=True, eq=False)
class Drawing:
    """What one pipeline drew for a request."""

    #: Latents [B, C, h, w].
    latents: Array
    #: Images uint8 [B, H, W, 3]. An image with NaN or infinite values is black.
    images: Array
    #: Whether the latents and the decoder's output of each image are finite, bool [B].
    finite: Array


@dataclass(frozen=True, eq=False)
class Pair:
    """The bundle's and diffusers' results for one request."""

    found: Drawing
    wanted: Drawing

    @property
    def latents(self) -> tuple[Array, Array]:
        """Latents [B, C, h, w] of both."""
        return self.found.latents, self.wanted.latents

    @property
    def images(self) -> tuple[Array, Array]:
        """Images uint8 [B, H, W, 3] of both."""
        return self.found.images, self.wanted.images


def draw(runtime: SanaRuntime, request: Request) -> Drawing:
    """Draw a request with a bundle. Unlike `SanaRuntime.__call__`, it accepts values that are not finite."""
    plan = runtime.plan(request)
    *_, last = runtime.steps(plan, runtime.encode(plan))
    latents = runtime.to_host(last.latents)
    finite = np.array([np.isfinite(own).all() for own in latents])
    images = np.zeros((len(latents), plan.output_height, plan.output_width, 3), np.uint8)
    for index in np.flatnonzero(finite):
        image = runtime.decode_raw(plan.one_image, latents[index : index + 1])
        finite[index] = np.isfinite(runtime.to_host(image)).all()
        if finite[index]:
            images[index] = runtime.to_host(runtime.run("postprocess", {"image": image, **vars(plan.resize)})["pixels"])[0]
    return Drawing(latents, images, finite)


@torch.no_grad()
def draw_reference(runtime: SanaRuntime, pipeline: Any, request: Request) -> Drawing:
    """Draw a request with diffusers' `pipeline`. It must be as complete as `call_reference` needs it.

    The bundle in `runtime` only says which size and seed the request means.
    """
    plan = runtime.plan(request)
    latents = call_reference(pipeline, request, plan.seeds[0], output_type="latent")
    image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    if bins_resolution(request, runtime.manifest.model.sample_size):
        image = pipeline.image_processor.resize_and_crop_tensor(image, plan.output_width, plan.output_height)
    images = pipeline.image_processor.postprocess(image, output_type="pil")
    return Drawing(latents.numpy(), np.stack([*map(np.asarray, images)]), np.ones(len(images), bool))


def sample_both(runtime: SanaRuntime, pipeline: Any, request: Request) -> Pair:
    """Draw one request with the bundle and with diffusers."""
    return Pair(draw(runtime, request), draw_reference(runtime, pipeline, request))
