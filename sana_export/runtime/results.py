"""What the stages of the runtime return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from sana_export.formats.arrays import Array, Float32
from sana_export.runtime.backends.base import DeviceTensor

Images = list[Image.Image] | Float32


@dataclass(frozen=True)
class Timings:
    """Seconds; on a GPU measured by its events."""

    #: Includes tokenizing.
    text_encoder: float
    context: float
    #: Each step, including callbacks. Empty if all steps ran as one CUDA graph.
    denoise: tuple[float, ...]
    #: All steps.
    denoise_loop: float
    #: Includes resizing and rounding.
    vae_decoder: float
    #: The whole call, on the host's clock.
    total: float


@dataclass(frozen=True, eq=False)
class SanaResult:
    """The images of one call, those of the first prompt first."""

    #: Pillow images, float32 [B, height, width, 3] in [0, 1], or latents float32 [B, C, h, w], by `output_type`.
    images: Images
    #: Pass them as `seed` to get the same images again.
    seeds: tuple[int, ...]
    #: Of the images, in pixels.
    height: int
    #: Of the images, in pixels.
    width: int
    timings: Timings


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What the denoiser reads of the prompts, on the device (contract.py has the shapes)."""

    context: DeviceTensor
    context_mask: DeviceTensor
    #: (K, B, L): guidance branches, images and text tokens, the shape of `context_mask`.
    shape: tuple[int, int, int]
    #: Events of the backend: before the text encoder, after it, and after the context graph.
    events: tuple[Any, Any, Any]


@dataclass(eq=False)
class Step:
    """State after a sampling step."""

    #: From 0.
    index: int
    #: The schedule's, as diffusers passes it to callbacks.
    timestep: float
    #: [B, C, h, w] on the device. Assign to it to go on with other latents.
    latents: DeviceTensor | Array
    #: The image that the model predicts now, as latents [B, C, h, w] on the device.
    x0: DeviceTensor
