"""What the stages of the runtime return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sana_export.formats.arrays import Array, Float32
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.unpicklable import OfThisProcess

Images = list[Image.Image] | Float32


@dataclass(frozen=True)
class Timings:
    """Seconds, measured with events on a GPU."""

    #: Tokenizing and the text encoder.
    text_encoder: float
    #: The context graph.
    context: float
    #: Each step, including callbacks. Empty if all steps ran as one CUDA graph.
    denoise: tuple[float, ...]
    #: All steps.
    denoise_loop: float
    #: Decoding, resizing and rounding.
    vae_decoder: float
    #: The whole call, by the host's clock.
    total: float


@dataclass(frozen=True, eq=False)
class SanaResult:
    """The images of one call, those of the first prompt first."""

    #: As `output_type` says: Pillow images, float32 [B, height, width, 3] in [0, 1], or latents float32 [B, C, h, w].
    images: Images
    #: Pass them as `seed` to get the same images again.
    seeds: tuple[int, ...]
    #: Height of the images in pixels.
    height: int
    #: Width of the images in pixels.
    width: int
    #: Seconds of each stage; of the whole batch for requests that were drawn together.
    timings: Timings
    #: For each image: how it was drawn, as `save_image` writes it into the file (runtime/metadata.py).
    metadata: tuple[Mapping[str, Any], ...] = ()

    def __getitem__(self, key: int | str) -> Any:
        """`result[0]` and `result["images"]` are the images, as in diffusers, and `(images,) = result` works."""
        return {"images": self.images}[key] if isinstance(key, str) else (self.images,)[key]

    def __len__(self) -> int:
        return 1


@dataclass(frozen=True, eq=False)
class Conditioning(OfThisProcess):
    """The encoded prompts, as inputs of the denoiser on the device (contract.py has the shapes)."""

    #: Cross-attention keys and values.
    context: DeviceTensor
    #: float32 [K, B, L]: 1 for the tokens of a prompt.
    context_mask: DeviceTensor
    #: (K, B, L): guidance branches, images and text tokens, the shape of `context_mask`.
    shape: tuple[int, int, int]
    #: Events of the backend: before the text encoder, after it, and after the context graph.
    events: tuple[Any, Any, Any]


@dataclass(eq=False)
class Step(OfThisProcess):
    """The state after a sampling step."""

    #: Number of the step, from 0.
    index: int
    #: Timestep of the schedule, as diffusers passes it to callbacks.
    timestep: float
    #: [B, C, h, w] on the device. Assign an array, or a tensor on the device, to continue with other latents.
    latents: DeviceTensor | Array
    #: The image that the model predicts at this step, as latents [B, C, h, w] on the device.
    x0: DeviceTensor
