"""The autoencoder's stand-in."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from torch import Tensor, nn

from sana_export.integrations.diffusers.module import BundleModule, graph_call
from sana_export.runtime.missing_graphs import no_encoder
from sana_export.runtime.plan import Plan, choose_tile
from sana_export.runtime.request import Request

#: What `enable_tiling` sets.
_TILING = (
    *("use_tiling", "tile_sample_min_height", "tile_sample_min_width", "tile_sample_stride_height", "tile_sample_stride_width"),
    *("tile_latent_min_height", "tile_latent_min_width"),
)


class BundleVae(BundleModule, AutoencoderDC):
    """Latents to images and back. Each image is coded alone.

    With `enable_tiling`, an image larger than a tile is coded in the bundle's tiles, which give the values of one piece, without
    diffusers' overlap and blending. Images of more than 2048x2048 pixels always are.
    """

    def attach(self, name: str, use: Any, original: nn.Module) -> BundleVae:
        super().attach(name, use, original)
        for option in _TILING:  # enable_tiling() may have been called already
            setattr(self, option, getattr(original, option))
        return self

    @graph_call
    def decode(self, z: Tensor, return_dict: bool = True) -> Any:
        """z [B, C, h, w], latents divided by the scaling factor -> float32 [B, 3, H, W] in about [-1, 1]."""
        latents = z.float() * self.config.scaling_factor  # the graph divides
        plan = self._plan(*latents.shape[2:])
        images = [self._taken(self.runtime.decode_raw(plan, self.exchange.give(one))) for one in latents.split(1)]
        sample = torch.cat(images).to(z.device)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @graph_call
    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """x [B, 3, H, W] in [-1, 1] -> latents float32 [B, C, h, w], not multiplied by the scaling factor."""
        if "vae_encoder" not in self.runtime.manifest.graphs:
            raise no_encoder(self.runtime.bundle, self.runtime.manifest, "no vae_encoder")
        encoded: list[Tensor] = []
        images = x.float().split(1)
        for index, image in enumerate(images):
            # A pipeline with guidance repeats its control image.
            same = next((other for other in range(index) if torch.equal(images[other], image)), None)
            encoded.append(self._encoded(image) if same is None else encoded[same])
        latents = torch.cat(encoded).to(x.device) / self.config.scaling_factor  # the graph multiplies
        return EncoderOutput(latent=latents) if return_dict else (latents,)

    def _encoded(self, image: Tensor) -> Tensor:
        """The sampler's latents of one image."""
        scale = self.runtime.manifest.model.encoder_tile_scale
        tile = -(-self._tile(*image.shape[2:]) // scale) * scale
        if tile:
            return torch.from_numpy(self.runtime.encode_raw(image.cpu().numpy(), tile))
        return self.exchange.take(self.runtime.run("vae_encoder", {"image": self.exchange.give(image)})["latents"])

    def _tile(self, height: int, width: int) -> int:
        """The side in pixels of the tiles that an image is coded in; 0 for one piece."""
        if self.use_tiling and (height > self.tile_sample_min_height or width > self.tile_sample_min_width):
            return int(min(self.tile_sample_min_height, self.tile_sample_min_width))
        return choose_tile(None, height, width)

    def _plan(self, height: int, width: int) -> Plan:
        """The plan to decode one image of these latents."""
        model = self.runtime.manifest.model
        factor, scale = model.vae_scale_factor, model.decoder_tile_scale
        tile = -(-self._tile(height * factor, width * factor) // scale) * scale
        size: dict[str, Any] = {"height": height * factor, "width": width * factor, "use_resolution_binning": False}
        return self.runtime.plan(Request("", guidance_scale=1.0, num_inference_steps=2, seed=0, decoder_tile=tile, **size))

    def _taken(self, image: Any) -> Tensor:
        """What `decode_raw` returns, on the device; an image in tiles is assembled on the host."""
        return torch.from_numpy(image) if type(image).__module__ == "numpy" else self.exchange.take(image)
