"""The decoder equals diffusers' AutoencoderDC in float32, whole and in tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sana_export.architectures import AUTOENCODER, AUTOENCODER_DEFAULTS, LITE
from sana_export.graphs import vae_blocks, vae_decoder
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.patches import in_bands, in_patches, patches_of
from sana_export.graphs.vae_blocks import MultiscaleAttention
from sana_export.graphs.vae_decoder import (
    LAST_BANDS,
    VaeDecoder,
    VaeDecoderHead,
    VaeDecoderTail,
    feature_channels,
    tile_halo,
    tile_scale,
)
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.supported import VAE_ACTIVATIONS, VAE_BLOCKS, unsupported
from sana_export.synth.recipes import RECIPES
from tests.support.vae import build_vae

CONFIGS = {
    "plain": {},
    "two layers a stage": {"decoder_layers_per_block": (2,) * 6},
    "other widths": {"decoder_block_out_channels": (16, 16, 32, 32, 64, 128)},
    "two aggregations": {"decoder_qkv_multiscales": ((), (), (), (3, 5), (5,), ())},
    "attention in four stages": {"decoder_block_types": ("ResBlock",) * 2 + ("EfficientViTBlock",) * 4},
    "DC-AE-Lite": LITE,
    "shuffled pixels": {"upsample_block_type": "pixel_shuffle"},
    "no stage at full resolution": {"decoder_layers_per_block": (0, 1, 2, 1, 1, 1)},
    "no blocks in the lowest stage": {"decoder_layers_per_block": (1, 1, 1, 1, 1, 0), "decoder_conv_act_fn": "silu"},
    "other activations": {"decoder_act_fns": ("relu", "silu", "swish", "relu", "relu", "silu")},
    "no shortcut of the latents": {"decoder_in_shortcut": False},
    "batch norm": {"decoder_norm_types": ("batch_norm", "rms_norm", "batch_norm", "batch_norm", "rms_norm", "batch_norm")},
    "five stages": {key: AUTOENCODER[key][1:] for key in AUTOENCODER if key.endswith(("layers_per_block", "types", "multiscales"))}
    | {
        "decoder_norm_types": "rms_norm",
        "decoder_block_out_channels": (32, 32, 64, 64, 128),
        "encoder_block_out_channels": (16, 32, 32, 32, 32),
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (2, 4, 9), (1, 2, 3)])
@torch.no_grad()
def test_equals_diffusers(config, batch, height, width):
    """At the last size the first stage has at most 32 pixels, for which diffusers uses its quadratic attention."""
    vae = build_vae(config)
    latents = torch.randn(batch, 32, height, width)
    wanted = vae.decode(latents / vae.config.scaling_factor).sample
    found = VaeDecoder(dict(vae.config), vae.state_dict(), NUMERICS["float32"])(latents)
    stride = vae.spatial_compression_ratio
    assert found.shape == wanted.shape == (batch, 3, stride * height, stride * width)
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    assert cosine >= 0.999999
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


#: Changes of a config that the graphs do not support, and what is said about each.
UNSUPPORTED = [
    ({"upsample_block_type": "bilinear"}, ["upsample_block_type is 'bilinear', supported: 'interpolate' or 'pixel_shuffle'"]),
    ({"decoder_act_fns": "gelu"}, ["decoder_act_fns is 'gelu', supported: silu or swish or relu"]),
    ({"decoder_conv_act_fn": "mish"}, ["decoder_conv_act_fn is 'mish', supported: 'silu' or 'swish' or 'relu'"]),
    ({"decoder_norm_types": ["layer_norm"] * 6}, ["decoder_norm_types is ['layer_norm', 'layer_n"]),
    ({"decoder_block_types": ("ResBlock",) * 5 + ("AttnBlock",)}, ["supported: ResBlock or EfficientViTBlock"]),
    ({"decoder_layers_per_block": (1, 1, 0, 1, 1, 1)}, ["at least 1 except in the first and the last stage"]),
    ({"decoder_layers_per_block": (1, 1)}, ["decoder_layers_per_block is 2 entries, supported: 6"]),
    ({"decoder_layers_per_block": None}, ["decoder_layers_per_block is None"]),
    ({"decoder_qkv_multiscales": ((),) * 3 + ((4,),) * 3}, ["odd kernel sizes"]),
    ({"decoder_qkv_multiscales": ()}, ["decoder_qkv_multiscales is 0 entries"]),
    ({"decoder_block_out_channels": (16, 32, 32, 48, 64, 64)}, ["48 is a divisor of 4 times 32"]),
    ({"decoder_block_out_channels": (32, 32, 32, 32)}, ["supported: 4"]),
    ({"encoder_block_out_channels": (16, 16, 32, 32, 32)}, ["6 stages, supported: 5, as in encoder_block_out_channels"]),
    ({"latent_channels": 48}, ["a divisor of the lowest stage's 64 channels"]),
    ({"in_channels": 4}, ["in_channels is 4, supported: 3"]),
    ({"scaling_factor": 0}, ["scaling_factor is 0, supported: a positive number"]),
    ({"scaling_factor": float("nan"), "decoder_in_shortcut": 2}, ["scaling_factor is nan", "decoder_in_shortcut is 2"]),
]


@pytest.mark.parametrize(("changes", "said"), UNSUPPORTED)
def test_unsupported_configs_are_refused_with_every_problem(changes, said):
    config = {**AUTOENCODER_DEFAULTS, **RECIPES["tiny-random"].vae, **changes}
    problems = [f"{one.key} is {one.found}, supported: {one.wanted}" for one in unsupported("AutoencoderDC", config, config)]
    for part in said:
        assert any(part in problem for problem in problems), problems


def test_the_tables_name_what_the_blocks_implement():
    assert set(VAE_BLOCKS) == set(vae_blocks.BLOCKS)
    assert set(VAE_ACTIVATIONS) == set(vae_blocks.ACTIVATIONS)
    assert list(unsupported("AutoencoderDC", AUTOENCODER_DEFAULTS, {})) == []


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
    "DC-AE-Lite": (LITE, 18, 32),
    "shuffled pixels": ({"upsample_block_type": "pixel_shuffle"}, 4, 8),
    "attention at half the resolution": (
        {"decoder_block_types": "EfficientViTBlock", "decoder_layers_per_block": (0, 1, 1, 1, 1, 1)}
        | {"decoder_block_out_channels": (32, 32, 32, 64, 64, 64), "upsample_block_type": "pixel_shuffle"},
        1,
        2,
    ),
}
#: Allowed difference for another order of float32 summation, relative to the image's largest value.
ROUNDING = 1e-5


def weights_of(config):
    """The config and the weights of `build_vae`."""
    vae = build_vae(config)
    return dict(vae.config), vae.state_dict()


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
    vae = build_vae(config)
    modules = build_graphs(dict(vae.config), vae.state_dict())
    assert (tile_halo(modules[2]), tile_scale(vae.config)) == (halo, scale)
    for batch, height, width in ((2, 2, 5), (1, 6, 1)):
        latents = torch.randn(batch, 32, height, width)
        features = modules[1](latents)
        assert features.shape == (batch, feature_channels(vae.config), *(32 // scale * side for side in (height, width)))
        for tile in (max(32 // scale - 1, 1), 3 * 32 // scale, 1000):
            assert tiled_error(*modules, latents, tile, halo, scale) < ROUNDING


@pytest.mark.parametrize(("config", "halo", "scale"), TAILS.values(), ids=TAILS)
def test_the_halo_is_how_far_gradients_reach(config, halo, scale):
    """The pixels of one feature depend on all features up to the halo away, and on none beyond."""
    side, own, whole = 2 * halo + 3, slice((halo + 1) * scale, (halo + 2) * scale), slice(None)
    tail = build_graphs(*weights_of(config))[2]
    channels = feature_channels({**RECIPES["tiny-random"].vae, **config})
    for size, pixels in (((side, 1), (own, whole)), ((1, side), (whole, own))):
        features = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
        image = tail.image(features)[(whole, whole, *pixels)]
        (image * torch.randn(image.shape)).sum().backward()
        reached = features.grad.abs().amax((0, 1)).flatten() > 0
        assert torch.nonzero(reached).flatten().tolist() == list(range(1, side - 1))


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
    vae = build_vae(config)
    modules = build_graphs(dict(vae.config), reach_far(vae.state_dict(), corner, 3))
    assert tile_halo(modules[2]) == halo
    latents = torch.randn(1, 32, 5, 5)
    assert tiled_error(*modules, latents, 4, halo, scale) < ROUNDING
    assert tiled_error(*modules, latents, 4, halo - 1, scale) > 0.01


@pytest.mark.parametrize(("config", "scale"), [({}, 8), (LITE, 32)], ids=["plain", "DC-AE-Lite"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@torch.no_grad()
def test_head_and_tail_equal_the_decoder_in_half_precision(precision, config, scale):
    vae = build_vae(config)
    parts = dict(vae.config), vae.state_dict(), NUMERICS[precision]
    whole, head, tail = VaeDecoder(*parts), VaeDecoderHead(*parts, bands=1), VaeDecoderTail(*parts)
    latents = torch.randn(2, 32, 2, 3)
    features = head(latents)
    assert features.dtype == NUMERICS[precision].dtype
    sides = (2 * 32 // scale, 3 * 32 // scale)
    assert torch.equal(tail(features, *map(torch.arange, sides)), whole(latents))


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("precision", NUMERICS)
@torch.no_grad()
def test_bands_change_only_the_order_of_sums(precision, height):
    """Down to a single row of latents. In half precision, sums of another order are now and then rounded to the next number.

    On patches of a few pixels torch uses other kernels, so a single latent has a test of its own.
    """
    vae = build_vae({})
    parts = dict(vae.config), vae.state_dict(), NUMERICS[precision]
    plain, banded = VaeDecoderHead(*parts, bands=1), VaeDecoderHead(*parts)
    assert {module.bands for module in banded.modules() if isinstance(module, MultiscaleAttention)} == {1, 2}
    latents = torch.randn(1, 32, height, 5)
    wanted, found = plain(latents).float(), banded(latents).float()
    # In float32, the limit is that of every other order of sums: this one changes hundreds of them, one after the other.
    limit = ROUNDING if precision == "float32" else 2 * torch.finfo(NUMERICS[precision].dtype).eps
    assert (found - wanted).abs().max() <= limit * wanted.abs().max()


@torch.no_grad()
def test_a_single_latent_in_patches():
    vae = build_vae({})
    parts = dict(vae.config), vae.state_dict(), NUMERICS["float32"]
    latents = torch.randn(1, 32, 1, 1)
    wanted, found = VaeDecoderHead(*parts, bands=1)(latents), VaeDecoderHead(*parts)(latents)
    assert (found - wanted).abs().max() <= ROUNDING * wanted.abs().max()


#: The number of bands of some of `TAILS` and of a decoder whose last blocks reach further.
BANDS = {"plain": 4, "published structure": 4, "DC-AE-Lite": 1, "deep": 2}
DEEP = {"decoder_layers_per_block": (4, 1, 1, 1, 1, 1)}


@pytest.mark.parametrize("name", BANDS)
@torch.no_grad()
def test_the_last_blocks_in_bands(name, monkeypatch):
    """In half precision, from a single row of latents on. A halo one pixel shorter shows; through many blocks, half of one."""
    parts = *weights_of(DEEP if name == "deep" else TAILS[name][0]), NUMERICS["float32"]
    decoder = VaeDecoder(*parts)
    assert decoder.bands == 1
    assert VaeDecoder(*parts[:2], NUMERICS["float16"]).bands == LAST_BANDS
    used = []
    for latents in (torch.randn(2, 32, 1, 1), torch.randn(1, 32, 3, 2)):
        decoder.bands = 1
        wanted, decoder.bands = decoder(latents), LAST_BANDS
        with monkeypatch.context() as patch:
            patch.setattr(vae_decoder, "in_bands", lambda *args: used.append(args[1]) or in_bands(*args))
            found = decoder(latents)
            shorter = (lambda halo: halo // 2) if name == "deep" else (lambda halo: halo - 1)
            patch.setattr(vae_decoder, "in_bands", lambda x, bands, halo, *rest: in_bands(x, bands, shorter(halo), *rest))  # noqa: B023
            wrong = decoder(latents)
        assert (found - wanted).abs().max() <= ROUNDING * wanted.abs().max()
        assert ((wrong - wanted).abs().max() > ROUNDING * wanted.abs().max()) == (BANDS[name] > 1)
    assert used == [BANDS[name]] * 2


@pytest.mark.parametrize(("bands", "halo"), [(1, 2), (2, 2), (4, 1), (4, 2)])
def test_patches_read_their_neighborhood_and_nothing_else(bands, halo):
    """Each patch is its own part of x, read with the pixels around it, and the results are put where the patch was."""
    x = torch.arange(2 * 8 * 12.0).reshape(1, 2, 8, 12)
    found = list(patches_of(x, bands, halo))
    assert len(found) == bands**2
    rows, columns = 8 // bands, 12 // bands
    for index, patch in enumerate(found):
        row, column = index // bands * rows, index % bands * columns
        read = x[..., max(row - halo, 0) : row + rows + halo, max(column - halo, 0) : column + columns + halo]
        assert torch.equal(patch.read, read)
        assert torch.equal(patch.own(patch.read), x[..., row : row + rows, column : column + columns])
    assert torch.equal(in_patches(x, bands, halo, lambda patch: patch.own(patch.read) * 2), x * 2)
    assert [patch.read.shape[3] for patch in patches_of(x.half(), bands, halo)] == [12] * bands
