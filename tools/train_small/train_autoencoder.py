"""Trains the DC-AE: reconstruction of random scenes, with some noise on the latents, which the transformer will not hit exactly."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from tools.train_small import training
from tools.train_small.glyphs import FONT, Bitmaps, font_bitmaps
from tools.train_small.networks import VAE
from tools.train_small.scenes import SIZE, Scene, draw_pool

#: The noise on the latents reaches this share of their deviation.
LATENT_NOISE = 0.05
#: How many times as much as the background a glyph counts: a small one is a small part of its picture, and the hardest to keep.
GLYPH_WEIGHT = 4.0
#: How strongly the latents are kept at deviation 1.
SCALE_LOSS = 0.01
#: How the weights of the convolutions end that change the size or lead to and from the latents.
RESAMPLING = ("conv.weight", "encoder.conv_out.weight", "decoder.conv_in.weight")


def build(config: dict[str, Any] = VAE, seed: int = 0) -> Any:
    """A fresh autoencoder. Its resampling convolutions start small beside their shortcuts, so the scale of the stream is kept."""
    from diffusers import AutoencoderDC

    torch.manual_seed(seed)
    network = AutoencoderDC(**config)
    for name, value in network.named_parameters():
        if name.endswith(RESAMPLING):
            value.data.mul_(0.3)
    return network.to(memory_format=torch.channels_last)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def emphasis(scenes: Sequence[Scene]) -> Tensor:
    """What each pixel counts, [B, 1, H, W] of mean 1 in each picture: GLYPH_WEIGHT times as much inside the squares of glyphs."""
    weight = torch.ones(len(scenes), 1, SIZE, SIZE)
    for own, scene in zip(weight, scenes, strict=True):
        for _, x, y, side in scene.glyphs:
            left, up = x - side // 2, y - side // 2
            own[:, max(up, 0) : up + side, max(left, 0) : left + side] = GLYPH_WEIGHT
    return weight / weight.mean((1, 2, 3), keepdim=True)


def reconstruction_loss(found: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean absolute error at three scales and of the differences between neighbours. Images [B, 3, H, W]."""
    error = (found - wanted) * weight
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    coarse = sum((avg_pool2d(error, scale).abs().mean() for scale in (2, 4)), error.abs().mean())
    return coarse + 0.5 * edges


def train(options: argparse.Namespace, bitmaps: Bitmaps, config: dict[str, Any] = VAE, compiled: bool = True) -> Any:
    """Train or resume; returns the autoencoder with its averaged weights."""
    network = build(config, options.seed).to(options.device)
    if options.decoder_only:
        network.encoder.requires_grad_(False)
    file = options.folder / ("decoder.pt" if options.decoder_only else "autoencoder.pt")
    if options.decoder_only and not file.is_file():
        training.load_average(network, options.folder / "autoencoder.pt")
    state = training.Training(network, file, steps=options.steps, rate=options.rate, seed=options.seed)
    scenes, pictures = draw_pool(options.pool, options.seed, bitmaps)

    def loss(rng: np.random.Generator, noise: torch.Generator) -> Tensor:
        chosen = rng.integers(len(pictures), size=options.batch)
        wanted, weight = to_tensor(pictures[chosen]), emphasis([scenes[index] for index in chosen])
        wanted = wanted.to(options.device, memory_format=torch.channels_last)
        with torch.autocast(wanted.device.type, dtype=torch.bfloat16):
            latents = network.encode(wanted).latent
            scale = latents.float().std()
            share = LATENT_NOISE * scale.detach() * torch.rand(len(latents), 1, 1, 1, generator=noise)
            latents = latents + share * torch.randn(latents.shape, generator=noise)
            found = network.decode(latents).sample
        return reconstruction_loss(found.float(), wanted, weight.to(options.device)) + SCALE_LOSS * (scale - 1).square()

    with training.fast_norm(compiled):
        state.run(loss)
    state.use_average()
    return network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    training.add_arguments(parser, steps=5000, batch=16, rate=1.5e-3)
    parser.add_argument("--decoder-only", action="store_true", help="train the decoder on, the latents stay what they are")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument(
        "--font", type=Path, default=FONT, help="a colour font with the glyphs (default: Debian's Noto Color Emoji)"
    )
    options = parser.parse_args()
    train(options, font_bitmaps(options.font))
