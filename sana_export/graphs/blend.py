"""Inpainting: after each step, what the mask protects goes back to the given image."""

from __future__ import annotations

from torch import Tensor, nn


class Blend(nn.Module):
    """mask * latents + (1 - mask) * ((1 - noise_level) * image_latents + noise_level * noise), all float32.

    latents, image_latents and noise are [B, C, h, w], mask [B, 1, h, w] and noise_level [1]. Returns [B, C, h, w]. Source: the loop
    of diffusers' StableDiffusion3InpaintPipeline.
    """

    def forward(self, latents: Tensor, image_latents: Tensor, noise: Tensor, mask: Tensor, noise_level: Tensor) -> Tensor:
        noised = (1.0 - noise_level) * image_latents + noise_level * noise
        return mask * latents + (1.0 - mask) * noised
