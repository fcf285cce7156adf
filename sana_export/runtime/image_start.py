"""Sampling that starts from an image: which steps remain, how noisy the start is, and what a mask protects.

In the variables of a schedule's table, the latents before step i are (1 - s) * image + s * noise for every solver, where s is the
step's noise level, `Schedule.sigmas`. For SANA-Sprint it is sin t / (cos t + sin t), which is also the denoiser's timestep:
diffusers' cos t * image + sin t * noise, times 1 / (cos t + sin t).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.numeric import real
from sana_export.runtime.images import (
    GivenImage,
    distinct,
    encoder_graphs,
    image_for_each,
    prepared_image,
    prepared_mask,
    warn_about_shape,
)
from sana_export.runtime.schedule import Schedule

LOG = logging.getLogger(__name__)

#: The default of diffusers' image-to-image and inpainting pipelines of flow models (SANA-Sprint, Stable Diffusion 3, Flux).
STRENGTH = 0.6
#: A start at or above this noise level shows nothing of the image.
PURE_NOISE = 0.995


def checked_strength(value: object) -> float:
    """`value` as a number above 0, up to 1. Raises UsageError."""
    strength = real("strength", value, 0, 1)
    if strength == 0:
        raise UsageError(
            "strength is out of range", found="0", wanted="a number above 0, up to 1", fix="--strength 0.05 changes the image least"
        )
    return strength


def first_step(steps: int, strength: float) -> int:
    """The step that `strength` starts at, as in diffusers' flow pipelines: int(N - N * strength).

    Raises UsageError if no step remains.
    """
    start = int(max(steps - min(steps * strength, steps), 0))
    if start >= steps:
        raise UsageError(
            "strength is so small that no step remains",
            found=f"strength {strength:g} of {steps} steps",
            wanted=f"strength {1 / steps:g} or more",
        )
    return start


@dataclass(frozen=True, eq=False)
class ImageStart:
    """The images that a plan starts from. B drawn images, N steps."""

    #: float32 [1, 3, H, W] each: the given images that are used, as the encoder reads them.
    images: tuple[Float32, ...]
    #: The number of each drawn image's own image in `images`: B numbers.
    sources: tuple[int, ...]
    #: float32 [B, 1, h, w]: 1 where the image is drawn anew, 0 where it stays. None without inpainting.
    mask: Float32 | None
    #: float32 [N + 1]: the noise level before each step, and 0.
    noise_levels: Float32
    #: Whether the latents start as noise alone: inpainting with strength 1.
    only_noise: bool
    #: The factor on noise alone.
    noise_scale: float
    #: Side in image pixels of the tiles that images are encoded in; 0 for one piece.
    tile: int

    @property
    def encoder_graphs(self) -> tuple[str, ...]:
        """The graphs that encode the images."""
        return encoder_graphs(self.tile)

    @property
    def loop_graphs(self) -> tuple[str, ...]:
        """The graphs that run in each step, besides those of every plan."""
        return () if self.mask is None else ("blend",)

    def noised(self, image_latents: Float32, noise: Float32) -> Float32:
        """The latents [B, C, h, w] before the first step, from the encoded images and the initial noise, of the same shape."""
        level = self.noise_levels[0]
        if self.only_noise:
            return noise * np.float32(self.noise_scale)
        return (np.float32(1) - level) * image_latents + level * noise


def plan_image_start(
    images: Sequence[GivenImage],
    masks: Sequence[GivenImage],
    strength: float,
    schedule: Schedule,
    *,
    prompts: int,
    per_prompt: int,
    size: tuple[int, int],
    output_size: tuple[int, int],
    factor: int,
    tile: int,
) -> ImageStart:
    """The start of a plan that samples at `size` (height, width) with the remaining steps in `schedule`.

    `factor` is the number of image pixels per latent pixel. No `masks`: image-to-image. Raises UsageError if the number of images
    or masks does not fit the prompts.
    """
    sources = image_for_each("image", len(images), prompts, per_prompt)
    used = distinct(sources)
    for number in used:
        warn_about_shape(images[number], *output_size)
    mask = None
    if masks:
        each = image_for_each("mask", len(masks), prompts, per_prompt)
        prepared = {number: prepared_mask(masks[number], *size, factor) for number in distinct(each)}
        mask = np.concatenate([prepared[number] for number in each])
    levels = np.append(schedule.sigmas[:-1], np.float32(0))  # what stays is not noisy in the end, as in diffusers
    if mask is None and strength < 1 and levels[0] >= PURE_NOISE:
        LOG.warning(
            "strength %g starts at pure noise with %d steps, so the image has no effect: use more steps or --strength %.3g",
            *(strength, len(schedule.timesteps), (len(schedule.timesteps) - 1) / len(schedule.timesteps) or 0.5),
        )
    return ImageStart(
        images=tuple(prepared_image(images[number], *size) for number in used),
        sources=tuple(used.index(number) for number in sources),
        mask=mask,
        noise_levels=levels,
        only_noise=mask is not None and strength == 1,
        noise_scale=schedule.initial_noise_scale,
        tile=tile,
    )
