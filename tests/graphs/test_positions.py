"""The denoiser's position table equals diffusers' at every size of the 2K and 4K checkpoints."""

from __future__ import annotations

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana_export.graphs.denoiser import LONGEST_AXIS, PositionTable
from sana_export.graphs.numerics import NUMERICS
from sana_export.resolutions import BINS

#: Native side in latent pixels, and interpolation_scale, of Sana 2K and 4K.
CHECKPOINTS = {"2K": (64, 1.0), "4K": (128, 2.0)}
#: Few, but they include both the fastest and the slowest waves.
CHANNELS = 64
#: The rounding of float32 angles up to 64 radians. diffusers computes angles in float64 from float32 coordinates.
TOLERANCE = 1e-5


def tables(name: str, precision: str):
    """The denoiser's table, and diffusers' patch embedding with zero weights, which returns its table."""
    side, scale = CHECKPOINTS[name]
    transformer = SanaTransformer2DModel(
        sample_size=side,
        interpolation_scale=scale,
        num_attention_heads=CHANNELS // 32,
        attention_head_dim=32,
        num_layers=0,
        caption_channels=8,
    )
    for parameter in transformer.patch_embed.parameters():
        parameter.zero_()
    return PositionTable(dict(transformer.config), NUMERICS[precision]), transformer.patch_embed


def sizes(name: str) -> list[tuple[int, int]]:
    """Every resolution bin of the checkpoint in latent pixels, and some other sizes."""
    bins = [(height // 32, width // 32) for height, width in BINS[CHECKPOINTS[name][0]].values()]
    return sorted({*bins, (CHECKPOINTS[name][0],) * 2, (8, 8), (33, 57), (1, 3)})


def worst(name: str, precision: str) -> float:
    table, embed = tables(name, precision)
    errors = []
    for height, width in sizes(name):
        wanted = embed(torch.zeros(1, 32, height, width))[0]
        found = table(height, width).float() / table.numerics.scale
        assert found.shape == wanted.shape == (height * width, CHANNELS)
        errors.append(float((found - wanted).abs().max()))
    return max(errors)


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_every_bin_of_the_checkpoint(name):
    assert (CHECKPOINTS[name][0],) * 2 in sizes(name)
    assert len(sizes(name)) > 40
    assert worst(name, "float32") < TOLERANCE


@pytest.mark.parametrize(("precision", "rounding"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_half_precision_only_rounds_the_table(name, precision, rounding):
    """The angles stay in float32, so the error is that of storing a value of at most 1."""
    assert worst(name, precision) < rounding / 2 + TOLERANCE


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_positions_are_exact(name, precision):
    """Positions and sizes are whole numbers in float32, so reading them from a table changes no bit."""
    table, _ = tables(name, precision)
    side, scale = CHECKPOINTS[name]
    for count in (1, 2, 3, 57, 127, 128, 511, LONGEST_AXIS):
        angles = (torch.arange(count).float() * (side / scale) / count).unsqueeze(-1) * table.frequencies
        wanted = torch.cat([angles.sin(), angles.cos()], dim=-1) * table.numerics.scale
        assert torch.equal(table.axis(count), wanted.to(table.numerics.dtype))
