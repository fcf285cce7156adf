"""The decoder equals diffusers' AutoencoderDC in float32, whole and in tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoder, VaeDecoderHead, VaeDecoderTail, feature_channels, tile_halo, tile_scale
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.synth.checkpoint import build_pipeline
from sana_export.synth.recipes import RECIPES

CONFIGS = {
    "plain": {},
    "two layers a stage": {"decoder_layers_per_block": (2,) * 6},
    "other widths": {"decoder_block_out_channels": (16, 16, 32, 32, 64, 128)},
    "two aggregations": {"decoder_qkv_multiscales": ((), (), (), (3, 5), (5,), ())},
    "attention in four stages": {"decoder_block_types": ("ResBlock",) * 2 + ("EfficientViTBlock",) * 4},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 4, 9), (1, 2, 3)])
@torch.no_grad()
def test_equals_diffusers(config, batch, height, width):
    """At the last size the first stage has at most 32 pixels, for which diffusers uses its quadratic attention."""
    recipe = RECIPES["tiny-random"]
    vae = build_pipeline(replace(recipe, vae={**recipe.vae, **config})).vae
    latents = torch.randn(batch, 32, height, width)
    wanted = vae.decode(latents / vae.config.scaling_factor).sample
    found = VaeDecoder(dict(vae.config), vae.state_dict(), NUMERICS["float32"])(latents)
    assert found.shape == wanted.shape == (batch, 3, 32 * height, 32 * width)
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    assert cosine >= 0.999999
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


#: Config, halo in features, and image pixels per feature. The numbers were derived by hand from the layers.
TAILS = {
    "plain": ({}, 3, 8),
    "published structure": ({"decoder_layers_per_block": (3,) * 6}, 7, 8),
    "attention in four stages": ({"decoder_block_types": ("ResBlock",) * 2 + ("EfficientViTBlock",) * 4}, 3, 4),
    "attention in every stage": (
        {"decoder_block_types": "EfficientViTBlock", "decoder_block_out_channels": (32, 32, 32, 64, 64, 64)},
        1,
        1,
    ),
    "no attention": ({"decoder_block_types": "ResBlock"}, 5, 32),
}
#: Allowed difference for another order of float32 summation, relative to the image's largest value.
ROUNDING = 1e-5


def build_graphs(config, weights):
    """The whole decoder, its head and its tail."""
    return tuple(graph(config, weights, NUMERICS["float32"]) for graph in (VaeDecoder, VaeDecoderHead, VaeDecoderTail))


@torch.no_grad()
def tiled_error(whole, head, tail, latents, tile, halo, scale):
    """Largest difference between the tiled and the untiled image, relative to the image's largest value."""
    wanted, features = whole(latents).numpy(), head(latents)
    windows = plan_windows(*features.shape[2:], tile, halo)
    image = np.full(wanted.shape, np.nan, np.float32)
    assemble(lambda *index: tail(features, *map(torch.from_numpy, index)).numpy(), windows, image, scale)
    return np.abs(image - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("config", "halo", "scale"), TAILS.values(), ids=TAILS)
def test_tiles_equal_the_whole_image(config, halo, scale):
    recipe = RECIPES["tiny-random"]
    vae = build_pipeline(replace(recipe, vae={**recipe.vae, **config})).vae
    modules = build_graphs(dict(vae.config), vae.state_dict())
    assert (tile_halo(modules[2]), tile_scale(vae.config)) == (halo, scale)
    for batch, height, width in ((2, 2, 5), (1, 6, 1)):
        latents = torch.randn(batch, 32, height, width)
        features = modules[1](latents)
        assert features.shape == (batch, feature_channels(vae.config), *(32 // scale * side for side in (height, width)))
        for tile in (max(32 // scale - 1, 1), 3 * 32 // scale, 1000):
            assert tiled_error(*modules, latents, tile, halo, scale) < ROUNDING


def reach_far(weights, corner, stages):
    """Weights of a decoder whose image depends mostly on the farthest features in the direction of `corner`.

    Every 3x3 kernel of the tail keeps only its tap in that corner, and every residual branch outweighs the stream.
    """
    tap = torch.zeros(3, 3)
    tap[corner] = 2.0
    far = dict(weights)
    count = 0
    for stage in reversed(range(stages)):
        names = [name for name in weights if name.startswith(f"decoder.up_blocks.{stage}.")]
        for name in names:
            if weights[name].shape[-2:] == (3, 3):
                far[name] = weights[name] * tap
            elif name.endswith("norm.weight"):
                count += 1
                far[name] = weights[name] * 10.0**count
    return far


@pytest.mark.parametrize("corner", [(0, 0), (0, 2), (2, 0), (2, 2)])
@pytest.mark.parametrize("name", ["plain", "published structure"])
def test_the_halo_is_sufficient_and_minimal(name, corner):
    config, halo, scale = TAILS[name]
    recipe = RECIPES["tiny-random"]
    vae = build_pipeline(replace(recipe, vae={**recipe.vae, **config})).vae
    modules = build_graphs(dict(vae.config), reach_far(vae.state_dict(), corner, 3))
    assert tile_halo(modules[2]) == halo
    latents = torch.randn(1, 32, 5, 5)
    assert tiled_error(*modules, latents, 4, halo, scale) < ROUNDING
    assert tiled_error(*modules, latents, 4, halo - 1, scale) > 0.01


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@torch.no_grad()
def test_head_and_tail_equal_the_decoder_in_half_precision(precision):
    vae = build_pipeline(RECIPES["tiny-random"]).vae
    whole, head, tail = (
        graph(dict(vae.config), vae.state_dict(), NUMERICS[precision]) for graph in (VaeDecoder, VaeDecoderHead, VaeDecoderTail)
    )
    latents = torch.randn(2, 32, 2, 3)
    features = head(latents)
    assert features.dtype == NUMERICS[precision].dtype
    assert torch.equal(tail(features, torch.arange(8), torch.arange(12)), whole(latents))
