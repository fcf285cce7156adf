"""Trains the text encoder and the transformer by flow matching on the latents of a trained autoencoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_export.synth.tokenizer import build_tokenizer
from tools.train_small import training
from tools.train_small.captions import draw_caption
from tools.train_small.glyphs import FONT, Bitmaps, font_bitmaps
from tools.train_small.networks import SCHEDULER, TEXT, TRANSFORMER
from tools.train_small.prompts import PromptEncoder
from tools.train_small.scenes import Scene, draw_scene, render
from tools.train_small.train_autoencoder import build as build_autoencoder
from tools.train_small.train_autoencoder import to_tensor

#: The share of captions that are left out, for classifier-free guidance.
DROPOUT = 0.1
TIMESTEPS = 1000


def build(text: dict[str, Any], transformer: dict[str, Any], seed: int = 0) -> nn.ModuleDict:
    """Fresh networks: text_encoder and transformer, whose branches start at zero."""
    from diffusers import SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    networks = nn.ModuleDict(
        {"text_encoder": Gemma2Model(Gemma2Config(**text)), "transformer": SanaTransformer2DModel(**transformer)}
    )
    nn.init.zeros_(networks["transformer"].proj_out.weight)
    nn.init.zeros_(networks["transformer"].proj_out.bias)
    return networks


@torch.no_grad()
def encode_pool(autoencoder: Any, pictures: np.ndarray, batch: int = 64) -> Tensor:
    """Latents float32 [N, 32, h, w] of pictures uint8 [N, H, W, 3], as the encoder gives them."""
    parts = [autoencoder.encode(to_tensor(pictures[i : i + batch])).latent for i in range(0, len(pictures), batch)]
    return torch.cat(parts).float().contiguous()


def noised(clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What the transformer sees and the velocity that it shall say: x = (1 - sigma) clean + sigma noise, noise - clean.

    The scheduler's "flow_prediction" takes clean = x - sigma * velocity (arXiv 2209.03003). Latents [B, C, h, w], sigma [B].
    """
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * clean + sigma * noise, noise - clean


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: logit-normal, then shifted as the scheduler shifts its own."""
    share = torch.sigmoid(torch.randn(count, generator=generator))
    shift = SCHEDULER["flow_shift"]
    return shift * share / (1 + (shift - 1) * share)


def load_pool(
    options: argparse.Namespace, bitmaps: Bitmaps, autoencoder: Any, state: training.Training
) -> tuple[list[Scene], Tensor, float]:
    """The pool's scenes, their latents, and the factor that brings these to deviation 1; encoded by the first worker, once."""
    rng = np.random.default_rng(options.seed + 1)
    scenes = [draw_scene(rng) for _ in range(options.pool)]
    file = options.folder / "latents.pt"
    if state.worker == 0 and not file.is_file():
        pictures = np.stack([render(scene, bitmaps) for scene in scenes])
        latents = encode_pool(autoencoder, pictures)
        torch.save({"latents": latents, "factor": round(1 / float(latents.std()), 5)}, file)
    state.wait()
    stored = torch.load(file, weights_only=True)
    if len(stored["latents"]) != len(scenes):
        raise SystemExit(f"{file} holds {len(stored['latents'])} scenes, not the {len(scenes)} of --pool: remove it to encode anew")
    return scenes, stored["latents"], stored["factor"]


def train(
    options: argparse.Namespace,
    bitmaps: Bitmaps,
    autoencoder: Any,
    text: dict[str, Any] = TEXT,
    transformer: dict[str, Any] = TRANSFORMER,
) -> tuple[nn.ModuleDict, float]:
    """Train or resume; returns the networks with their averaged weights and the latents' scaling factor."""
    tokenizer = build_tokenizer()
    networks = build({**text, "vocab_size": tokenizer.get_vocab_size()}, transformer, options.seed).to(options.device)
    state = training.Training(
        networks, options.folder / "transformer.pt", steps=options.steps, rate=options.rate, seed=options.seed
    )
    scenes, latents, factor = load_pool(options, bitmaps, autoencoder, state)
    latents = (latents * factor).to(options.device)
    encode = PromptEncoder(tokenizer)

    def loss(rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        chosen = rng.integers(len(scenes), size=options.batch)
        prompts = [None if rng.random() < DROPOUT else draw_caption(scenes[index], rng) for index in chosen]
        clean = latents[torch.from_numpy(chosen)]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        sigma = draw_sigma(len(chosen), generator).to(clean.device)
        x, velocity = noised(clean, noise, sigma)
        with torch.autocast(clean.device.type, dtype=torch.bfloat16):
            rows, mask = encode(networks["text_encoder"], prompts)
            found = networks["transformer"](x, rows, timestep=sigma * TIMESTEPS, encoder_attention_mask=mask).sample
        return (found.float() - velocity).square().mean()

    with sdpa_kernel(SDPBackend.MATH):  # on a CPU the fused one is slower
        state.run(loss)
    state.use_average()
    return networks, factor


def load_autoencoder(folder: Path) -> Any:
    """The autoencoder trained in `folder` with its averaged weights, its decoder as trained last."""
    network = build_autoencoder()
    training.load_average(network, folder / "autoencoder.pt")
    if (folder / "decoder.pt").is_file():
        training.load_average(network, folder / "decoder.pt", network.decoder)
    return network.requires_grad_(False).eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    training.add_arguments(parser, steps=13_000, batch=128, rate=1e-3)
    parser.add_argument("--autoencoder", help="folder of its training (default: the same as --folder)")
    parser.add_argument(
        "--font", type=Path, default=FONT, help="a colour font with the glyphs (default: Debian's Noto Color Emoji)"
    )
    options = parser.parse_args()
    train(options, font_bitmaps(options.font), load_autoencoder(options.folder))
