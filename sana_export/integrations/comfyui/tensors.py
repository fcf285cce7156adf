"""ComfyUI's IMAGE, MASK and LATENT, to and from what the runtime takes.

IMAGE is float32 [B, H, W, C] in [0, 1], MASK float32 [B, H, W] or [H, W], LATENT a dict with "samples" [B, C, h, w].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sana_export.errors import UsageError
from sana_export.formats.arrays import Array, Float32

#: The key of a LATENT that has the height and width in pixels that its sampler was asked for.
SIZE = "sana_export_size"


def image_from(name: str, image: torch.Tensor) -> Array:
    """An IMAGE as uint8 [B, H, W, 3], without transparency, as diffusers' numpy_to_pil rounds it.

    With 8 bits the runtime resizes it by Lanczos, as it does an image file. Raises UsageError for other shapes and NaN.
    """
    values = _bytes(name, image)
    if values.ndim != 4 or values.shape[-1] not in (3, 4):
        raise UsageError(f"{name} is not an image", found=f"shape {list(values.shape)}", wanted="IMAGE: [images, height, width, 3]")
    return values[..., :3]


def mask_from(name: str, mask: torch.Tensor) -> Array:
    """A MASK as uint8 [B, H, W, 1]. 1 is where the image is drawn anew, as in the runtime. Raises UsageError as `image_from`."""
    values = _bytes(name, mask)
    if values.ndim not in (2, 3):
        raise UsageError(f"{name} is not a mask", found=f"shape {list(values.shape)}", wanted="MASK: [images, height, width]")
    return values.reshape(-1, *values.shape[-2:], 1)


def to_image(images: Sequence[Image.Image], device: torch.device) -> torch.Tensor:
    """Images of 8 bits as an IMAGE. Its values are n / 255, so that ComfyUI, which truncates, saves the same bits."""
    values = np.stack([np.asarray(image) for image in images]).astype(np.float32) / np.float32(255)
    return torch.from_numpy(values).to(device)


def to_latent(latents: Float32, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """Latents of the runtime as a LATENT, for an image of `size` (height, width)."""
    return {"samples": torch.from_numpy(latents).to(device), SIZE: size}


def latents_from(latent: dict[str, Any]) -> Float32:
    """The samples of a LATENT, float32 [B, C, h, w]. Raises UsageError if they have another number of axes."""
    samples: Float32 = latent["samples"].detach().float().cpu().numpy()
    if samples.ndim != 4:
        wanted = "LATENT of a Sana sampler: [images, channels, height, width]"
        raise UsageError("these latents are not of an image", found=f"shape {list(samples.shape)}", wanted=wanted)
    return samples


def _bytes(name: str, values: torch.Tensor) -> Array:
    """Values in [0, 1] as 0 to 255. Those outside are clipped, as ComfyUI does when it saves an image."""
    array = values.detach().float().cpu().numpy()
    if not np.isfinite(array).all():
        raise UsageError(f"{name} has values that are not finite", found="NaN or infinity", wanted="values from 0 to 1")
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)
