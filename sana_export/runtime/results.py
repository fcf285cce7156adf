"""What the stages of the runtime return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sana_export.formats.arrays import Array, Float32
from sana_export.runtime.backends.base import DeviceTensor
from sana_export.runtime.control import ControlConditioning
from sana_export.runtime.guidance import Branches, Interval
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
    #: Encoding the images that the request starts from. 0 without.
    vae_encoder: float = 0.0


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
    #: The intervals of the request, as fractions of the steps: (0, 1) for all.
    guidance_interval: Interval
    pag_interval: Interval
    #: Seconds of each stage; of the whole batch for requests that were drawn together.
    timings: Timings
    #: The scheduler that ran: diffusers' `_class_name`, and all keys of its config that sampling reads.
    scheduler: Mapping[str, Any]
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

    #: Cross-attention keys and values of all branches with a prompt of their own.
    context: DeviceTensor
    #: float32 [U, B, L]: 1 for the tokens of a prompt.
    context_mask: DeviceTensor
    #: (U, B, L): branches with a prompt of their own, images and text tokens, the shape of `context_mask`.
    shape: tuple[int, int, int]
    #: Events of the backend: before the text encoder, after it, and after the context graph.
    events: tuple[Any, Any, Any]
    #: `context` and `context_mask` without the negative prompts, [1, B, L], if some steps run without them, as others do with them.
    unguided: tuple[DeviceTensor, DeviceTensor] | None = None
    #: float32 [B, C, h, w]: the encoded image of each drawn image. None if the plan starts from noise.
    image_latents: Float32 | None = None
    #: What the ControlNet reads. None if the plan has no control image.
    control: ControlConditioning | None = None

    def of(self, branches: Branches) -> tuple[DeviceTensor, DeviceTensor]:
        """The denoiser's context and mask for steps with these branches."""
        if self.unguided is not None and len(branches.texts) < self.shape[0]:
            return self.unguided
        return self.context, self.context_mask


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
