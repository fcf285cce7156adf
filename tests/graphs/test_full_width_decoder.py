"""The whole published DC-AE decoder (f32c32, sana-1.1) equals diffusers in float32 and is close to it in float16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sana_export.architectures import AUTOENCODER
from sana_export.graphs.numerics import FP16_MAX, NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoder
from tests.support.full_width import assert_equal, assert_near, build, run_half, seeded
from tests.support.heat import cool_decoder, heat_decoder

#: The change to normal weights, and height and width of the latents: 256 px, or so small that diffusers' attention computes its
#: products in another order.
KINDS = {"normal": (None, (8, 8)), "hot": (heat_decoder, (3, 4)), "quiet": (cool_decoder, (4, 3))}


@pytest.fixture(scope="module", params=KINDS)
@torch.no_grad()
def case(request):
    """A decoder with latents and diffusers' image. The stream of the hot decoder is far beyond the range of fp16."""
    vae = build("vae", AUTOENCODER, seed=6)
    change, size = KINDS[request.param]
    if change is not None:
        change(vae.decoder)
    largest = []
    for stage in vae.decoder.up_blocks:
        stage.register_forward_hook(lambda module, inputs, output: largest.append(output.abs().max().item()))
    latents = torch.randn(1, 32, *size, generator=seeded("decoder", size))
    wanted = vae.decode(latents / vae.config.scaling_factor).sample
    assert (min(largest) > 2 * FP16_MAX) == (request.param == "hot")
    return SimpleNamespace(name=f"{request.param} decoder, {size}", vae=vae, latents=latents, wanted=wanted)


def make_graph(case, precision):
    return VaeDecoder(dict(case.vae.config), case.vae.state_dict(), NUMERICS[precision])


@torch.no_grad()
def test_float32_equals_diffusers(case):
    assert_equal(f"{case.name}, float32", make_graph(case, "float32")(case.latents), case.wanted)


def test_float16_is_near_diffusers(case):
    name, graph = f"{case.name}, float16", make_graph(case, "float16")
    assert_near(name, run_half(name, lambda: graph(case.latents)), case.wanted)
