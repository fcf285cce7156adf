"""Blocks of a ControlNet of each published width equal diffusers in float32 and are close to it in float16."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_export.architectures import TRANSFORMER_DEFAULTS
from sana_export.controlnets import CONTROLNETS
from sana_export.export.parity import relative_error
from sana_export.graphs.context import Context
from sana_export.graphs.controlnet import ControlNet
from sana_export.graphs.numerics import NUMERICS
from sana_export.verify.reference import clamp_attention
from tests.support.full_width import assert_equal, assert_near, build, run_half, seeded
from tests.support.heat import heat_attention
from tests.support.transformer_cases import draw_inputs, quieten

BLOCKS = 2
SIZES = ((6, 6), (3, 13))
LENGTHS = (3, 77)
#: The published ControlNets, and whether the checkpoint is one that is clipped: then attention exceeds the range of float16.
CLIPPED = {"controlnet-hed-600m": True, "controlnet-hed-1600m": False}


def draw(config: Mapping[str, Any], size: tuple[int, int], alias: str) -> dict[str, Tensor]:
    inputs = draw_inputs({**TRANSFORMER_DEFAULTS, **config}, size, LENGTHS, alias)
    control = torch.randn(inputs["latents"].shape, generator=seeded(alias, size, "control"))
    return {**inputs, "control": control, "conditioning_scale": torch.tensor([0.7])}


@torch.no_grad()
def run_reference(controlnet: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """diffusers' residuals [R, K, 1, h, w, C]."""
    branches = len(inputs["context_mask"])
    samples = controlnet(
        inputs["latents"].repeat(branches, 1, 1, 1),
        encoder_hidden_states=inputs["prompt_embeds"].flatten(0, 1),
        encoder_attention_mask=inputs["context_mask"].flatten(0, 1),
        timestep=inputs["timestep"].expand(branches),
        controlnet_cond=inputs["control"].repeat(branches, 1, 1, 1),
        conditioning_scale=float(inputs["conditioning_scale"]),
    ).controlnet_block_samples
    return torch.stack([*samples]).unsqueeze(2).unflatten(3, tuple(inputs["latents"].shape[2:]))


@torch.no_grad()
def run_graphs(case: Any, inputs: Mapping[str, Tensor], precision: str) -> Tensor:
    config, weights, numerics = {**TRANSFORMER_DEFAULTS, **case.config}, case.controlnet.state_dict(), NUMERICS[precision]
    others = {name: value for name, value in inputs.items() if name != "prompt_embeds"}
    context = Context(config, weights, numerics)(inputs["prompt_embeds"])
    found: Tensor = ControlNet(config, weights, numerics, clamp=case.clipped)(context=context, **others)
    return found


@pytest.fixture(scope="module", params=CLIPPED)
def case(request: pytest.FixtureRequest) -> Any:
    """A ControlNet with inputs and diffusers' residuals."""
    alias, clipped = request.param, CLIPPED[request.param]
    config = {**CONTROLNETS[alias].config, "num_layers": BLOCKS}
    controlnet = build("controlnet", config, seed=5)
    quieten(controlnet)
    inputs = {size: draw(config, size, alias) for size in SIZES}
    if clipped:
        heat_attention(controlnet)
        before = run_reference(controlnet, inputs[SIZES[0]])
        clamp_attention(controlnet)
        assert relative_error(before.numpy(), run_reference(controlnet, inputs[SIZES[0]]).numpy()) > 0.1, "the clip must matter"
    wanted = {size: run_reference(controlnet, inputs[size]) for size in SIZES}
    return SimpleNamespace(alias=alias, config=config, clipped=clipped, controlnet=controlnet, inputs=inputs, wanted=wanted)


def test_float32_equals_diffusers(case: Any) -> None:
    for size in SIZES:
        assert_equal(f"{case.alias}, {size}, float32", run_graphs(case, case.inputs[size], "float32"), case.wanted[size])


def test_float16_is_near_diffusers(case: Any) -> None:
    for size in SIZES:
        name = f"{case.alias}, {size}, float16"
        found = run_half(name, lambda size=size: run_graphs(case, case.inputs[size], "float16"))  # type: ignore[misc]
        assert_near(name, found.float() / NUMERICS["float16"].scale, case.wanted[size])
