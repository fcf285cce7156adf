"""The encoder equals diffusers' AutoencoderDC in float32, whole and in tiles."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from sana_export.architectures import AUTOENCODER_DEFAULTS, LITE
from sana_export.export.half import WideProducts
from sana_export.graphs.numerics import FP16_MAX, NUMERICS
from sana_export.graphs.vae_encoder import (
    VaeEncoder,
    VaeEncoderHead,
    VaeEncoderTail,
    encoder_feature_channels,
    encoder_halo,
    encoder_tile_scale,
)
from sana_export.runtime.decoding import assemble, plan_windows
from sana_export.supported import unsupported, unsupported_encoder
from sana_export.synth.recipes import RECIPES
from tests.support.heat import heat_encoder
from tests.support.hot_checkpoints import measure_ranges
from tests.support.vae import build_vae

ATTENTION = "EfficientViTBlock"
CONFIGS = {
    "plain": {},
    "published depths": {"encoder_layers_per_block": (2, 2, 2, 3, 3, 3)},
    "other widths": {"encoder_block_out_channels": (16, 32, 32, 64, 64, 128)},
    "narrower below": {"encoder_block_out_channels": (32, 16, 32, 32, 64, 32)},
    "two aggregations": {"encoder_qkv_multiscales": ((), (), (), (3, 5), (5,), ())},
    "attention in four stages": {"encoder_block_types": ("ResBlock",) * 2 + (ATTENTION,) * 4},
    "attention in every stage": {"encoder_block_types": ATTENTION, "encoder_block_out_channels": (32,) * 6},
    "no attention": {"encoder_block_types": "ResBlock"},
    "shuffled pixels": {"downsample_block_type": "pixel_unshuffle"},
    "no stage at full resolution": {"encoder_layers_per_block": (0, 1, 2, 1, 1, 1)},
    "no stage at full resolution, shuffled pixels": {
        "encoder_layers_per_block": (0, 1, 1, 1, 1, 1),
        "downsample_block_type": "pixel_unshuffle",
    },
    "no blocks in the lowest stage": {"encoder_layers_per_block": (1, 1, 1, 1, 1, 0)},
    "no shortcut to the latents": {"encoder_out_shortcut": False, "encoder_block_out_channels": (12, 12, 24, 48, 48, 48)},
    "DC-AE-Lite": LITE,
    "five stages": {
        "encoder_block_types": ("ResBlock",) * 2 + (ATTENTION,) * 3,
        "encoder_block_out_channels": (16, 32, 32, 32, 64),
        "encoder_layers_per_block": (1, 1, 2, 1, 1),
        "encoder_qkv_multiscales": ((), (), (5,), (5,), (3,)),
        "decoder_block_types": "ResBlock",
        "decoder_block_out_channels": (32, 32, 64, 64, 128),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
}
#: Allowed difference for another order of float32 summation, relative to the largest value.
ROUNDING = 2e-5


def build_graphs(vae, precision="float32"):
    """The whole encoder, its head and its tail."""
    config, weights = dict(vae.config), vae.state_dict()
    return tuple(graph(config, weights, NUMERICS[precision]) for graph in (VaeEncoder, VaeEncoderHead, VaeEncoderTail))


def reference(vae, image):
    return vae.encode(image).latent * vae.config.scaling_factor


def relative(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 7), (2, 2, 3)])
@torch.no_grad()
def test_equals_diffusers(config, batch, height, width):
    """At the last size the lowest stage has at most 32 pixels, for which diffusers uses its quadratic attention."""
    vae = build_vae(config)
    stride = vae.spatial_compression_ratio
    image = torch.rand(batch, 3, stride * height, stride * width) * 2 - 1
    wanted = reference(vae, image)
    found = build_graphs(vae)[0](image)
    assert found.shape == wanted.shape == (batch, 32, height, width)
    assert found.dtype == torch.float32
    assert relative(found, wanted) <= ROUNDING
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    assert cosine >= 0.999999


#: Changes of a config that the graph does not support, and what is said about each.
UNSUPPORTED = [
    ({"downsample_block_type": "bilinear"}, "downsample_block_type is 'bilinear', supported: 'Conv' or 'pixel_unshuffle'"),
    ({"encoder_block_types": ("ResBlock",) * 5 + ("AttnBlock",)}, "supported: ResBlock or EfficientViTBlock"),
    ({"encoder_layers_per_block": (1, 1, 0, 1, 1, 1)}, "at least 1 except in the first and the last stage"),
    ({"encoder_layers_per_block": (1, 1)}, "encoder_layers_per_block is 2 entries, supported: 6"),
    ({"encoder_block_types": ("ResBlock",) * 5}, "encoder_block_types is 5 entries, supported: 6"),
    ({"encoder_qkv_multiscales": ((),) * 3 + ((4,),) * 3}, "odd kernel sizes"),
    ({"encoder_qkv_multiscales": ()}, "encoder_qkv_multiscales is 0 entries"),
    ({"encoder_block_out_channels": (16, 16, 32, 48, 32, 32)}, "48 is a divisor of 4 times 32"),
    ({"encoder_block_out_channels": (16, 16, 32, 32, 32, 48)}, "a divisor of the encoder's lowest stage, 48 channels"),
    ({"encoder_out_shortcut": 2}, "encoder_out_shortcut is 2, supported: True or False"),
]


@pytest.mark.parametrize(("changes", "said"), UNSUPPORTED)
def test_unsupported_encoders_are_refused_only_for_an_encoder(changes, said):
    config = {**AUTOENCODER_DEFAULTS, **RECIPES["tiny-random"].vae, **changes}
    problems = [f"{one.key} is {one.found}, supported: {one.wanted}" for one in unsupported_encoder(config, config)]
    assert any(said in problem for problem in problems), problems
    assert not list(unsupported("AutoencoderDC", config, config))


def test_the_defaults_of_the_class_are_supported():
    assert list(unsupported_encoder(AUTOENCODER_DEFAULTS, {})) == []


#: Config, halo in features, and image pixels per feature. The numbers were derived by hand from the layers.
HEADS = {
    "plain": ({}, 3, 8),
    "published depths": (CONFIGS["published depths"], 5, 8),
    "attention in four stages": (CONFIGS["attention in four stages"], 3, 4),
    "attention in every stage": (CONFIGS["attention in every stage"], 1, 1),
    "no attention": (CONFIGS["no attention"], 5, 32),
    "DC-AE-Lite": (LITE, 3, 8),
    "shuffled pixels": (CONFIGS["shuffled pixels"], 3, 8),
    "no stage at full resolution": (CONFIGS["no stage at full resolution"], 4, 8),
}


@torch.no_grad()
def tiled_error(vae, image, tile, halo):
    """Largest difference between the tiled and the untiled features, relative to the largest value."""
    _, head, _ = build_graphs(vae)
    scale = encoder_tile_scale(vae.config)
    wanted = head(image).numpy()
    windows = plan_windows(*wanted.shape[2:], tile, halo)

    def render(rows, columns):
        (top, bottom), (left, right) = ((index[0] * scale, (index[-1] + 1) * scale) for index in (rows, columns))
        return head(image[:, :, top:bottom, left:right]).numpy()

    features = assemble(render, windows, np.full(wanted.shape, np.nan, np.float32), 1)
    return np.abs(features - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize(("config", "halo", "scale"), HEADS.values(), ids=HEADS)
def test_tiles_equal_the_whole_image(config, halo, scale):
    vae = build_vae(config)
    whole, head, tail = build_graphs(vae)
    assert (encoder_halo(head, scale), encoder_tile_scale(vae.config)) == (halo, scale)
    for batch, height, width in ((2, 2, 5), (1, 6, 1)):
        image = torch.rand(batch, 3, 32 * height, 32 * width) * 2 - 1
        with torch.no_grad():
            features = head(image)
            assert features.shape == (batch, encoder_feature_channels(vae.config), height * 32 // scale, width * 32 // scale)
            torch.testing.assert_close(tail(features), whole(image), rtol=0, atol=0)
        for tile in (max(32 // scale - 1, 1), 3 * 32 // scale, 1000):
            assert tiled_error(vae, image, tile, halo) < ROUNDING


@pytest.mark.parametrize(("config", "halo", "scale"), HEADS.values(), ids=HEADS)
def test_the_halo_is_how_far_gradients_reach(config, halo, scale):
    """One feature depends on pixels of the features up to the halo before it. After it, it may depend on one feature fewer."""
    side = 2 * halo + 3
    head = build_graphs(build_vae(config))[1]
    for size in ((side, 1), (1, side)):
        image = torch.rand(1, 3, *(scale * length for length in size), requires_grad=True)
        features = head(image)
        middle = features[:, :, size[0] // 2, size[1] // 2]
        (middle * torch.randn(middle.shape)).sum().backward()
        along = image.grad.abs().amax((0, 1)).amax(1 if size[1] == 1 else 0).unflatten(0, (side, scale)).amax(1)
        reached = torch.nonzero(along > 0).flatten().tolist()
        assert reached == list(range(1, reached[-1] + 1))
        assert reached[-1] in (side - 3, side - 2)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("config", [{}, CONFIGS["shuffled pixels"]], ids=["plain", "shuffled pixels"])
@torch.no_grad()
def test_head_and_tail_equal_the_encoder_in_half_precision(config, precision):
    whole, head, tail = build_graphs(build_vae(config), precision)
    image = torch.rand(2, 3, 64, 96) * 2 - 1
    features = head(image)
    assert features.dtype == torch.float32
    assert torch.equal(tail(features), whole(image))


@pytest.mark.parametrize("config", [{}, CONFIGS["shuffled pixels"], LITE], ids=["plain", "shuffled pixels", "DC-AE-Lite"])
@pytest.mark.parametrize("hot", [False, True], ids=["as drawn", "hot"])
@torch.no_grad()
def test_half_precision_stays_in_range(config, hot):
    """Also if the stream and the convolutions exceed 65504, as in published autoencoders."""
    vae = copy.deepcopy(build_vae(config))
    if hot:
        heat_encoder(vae.encoder)
    image = torch.rand(1, 3, 128, 96) * 2 - 1
    ranges = measure_ranges(vae.encoder, r"down_blocks\.\d\.\d$", lambda: vae.encode(image))
    assert (max(found.max_abs for found in ranges.values()) > 2 * FP16_MAX) == hot
    wanted = reference(vae, image)
    with WideProducts():
        found = build_graphs(vae, "float16")[0](image)
    assert torch.isfinite(found).all()
    noise = (found - wanted).square().mean()
    decibels = 10 * torch.log10((wanted.max() - wanted.min()) ** 2 / noise)
    assert decibels >= 40
