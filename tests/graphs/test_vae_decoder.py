"""The decoder against diffusers' AutoencoderDC in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sana_export.errors import ArtifactError
from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoder
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
    """The last size takes diffusers' quadratic path (at most 32 pixels) in its first stage."""
    recipe = RECIPES["tiny"]
    vae = build_pipeline(replace(recipe, vae={**recipe.vae, **config})).vae
    latents = torch.randn(batch, 32, height, width)
    wanted = vae.decode(latents / vae.config.scaling_factor).sample
    found = VaeDecoder(dict(vae.config), vae.state_dict(), NUMERICS["float32"])(latents)
    assert found.shape == wanted.shape == (batch, 3, 32 * height, 32 * width)
    cosine = torch.nn.functional.cosine_similarity(found.double().flatten(), wanted.double().flatten(), dim=0)
    assert cosine >= 0.999999
    assert (found - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("key", "value"),
    [("upsample_block_type", "pixel_shuffle"), ("decoder_act_fns", "relu6"), ("decoder_norm_types", "batch_norm")],
)
def test_other_autoencoders_are_refused(key, value):
    vae = build_pipeline(RECIPES["tiny"]).vae
    with pytest.raises(ArtifactError, match=key):
        VaeDecoder({**vae.config, key: value}, vae.state_dict(), NUMERICS["float32"])
