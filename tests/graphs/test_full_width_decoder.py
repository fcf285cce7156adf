"""The whole decoders of DC-AE (f32c32, sana-1.1) and DC-AE-Lite equal diffusers in float32 and are close to it in float16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sana_export.architectures import AUTOENCODER, LITE
from sana_export.graphs.numerics import FP16_MAX, NUMERICS
from sana_export.graphs.vae_decoder import VaeDecoder
from tests.support.full_width import assert_equal, assert_near, build, run_half, seeded
from tests.support.heat import cool_decoder, heat_decoder

#: The config, the change to normal weights, and height and width of the latents: 192 px, or so small that diffusers' attention
#: computes its products in another order.
KINDS = {
    "normal": (AUTOENCODER, None, (6, 6)),
    "hot": (AUTOENCODER, heat_decoder, (3, 4)),
    "quiet": (AUTOENCODER, cool_decoder, (4, 3)),
    "normal Lite": (AUTOENCODER | LITE, None, (5, 4)),
    "hot Lite": (AUTOENCODER | LITE, heat_decoder, (3, 4)),
    "quiet Lite": (AUTOENCODER | LITE, cool_decoder, (3, 2)),
}


#: Of the Lite decoders, the hot one runs every time. The others have the same widths, with weights that are easier to compute with.
SLOW = ("normal Lite", "quiet Lite")


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS], ids=str
)
@torch.no_grad()
def case(request):
    """A decoder with latents and diffusers' image. The stream of the hot decoders is far beyond the range of fp16."""
    config, change, size = KINDS[request.param]
    vae = build("vae", config, seed=6)
    if change is not None:
        change(vae.decoder)
    largest = []
    for stage in filter(len, vae.decoder.up_blocks):
        stage.register_forward_hook(lambda module, inputs, output: largest.append(output.abs().max().item()))
    latents = torch.randn(1, 32, *size, generator=seeded("decoder", size))
    wanted = vae.decode(latents / vae.config.scaling_factor).sample
    assert (min(largest) > 2 * FP16_MAX) == ("hot" in request.param)
    return SimpleNamespace(name=f"{request.param} decoder, {size}", vae=vae, latents=latents, wanted=wanted)


def make_graph(case, precision):
    return VaeDecoder(dict(case.vae.config), case.vae.state_dict(), NUMERICS[precision])


@torch.no_grad()
def test_float32_equals_diffusers(case):
    assert_equal(f"{case.name}, float32", make_graph(case, "float32")(case.latents), case.wanted)


def test_float16_is_near_diffusers(case):
    name, graph = f"{case.name}, float16", make_graph(case, "float16")
    assert_near(name, run_half(name, lambda: graph(case.latents)), case.wanted)
