"""Three transformer blocks of each published width equal diffusers in float32 and are close to it in float16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sana_export.export.parity import relative_error
from sana_export.variants import VARIANTS
from sana_export.verify.reference import clamp_attention
from tests.support.full_width import assert_equal, assert_near, build, run_half
from tests.support.heat import cool_stream, heat_attention
from tests.support.transformer_cases import Graphs, draw_inputs, quieten, run_reference

BLOCKS = 3
#: Latent height and width.
SQUARE, WIDE, TALL = (6, 6), (3, 13), (9, 4)
#: One checkpoint of each width and kind: the seed of its weights, the change to them, and a size besides the square one. The first
#: two are clipped.
CHECKPOINTS = {
    "sana-600m-512px": (1, heat_attention, TALL),
    "sana-1600m-1024px": (2, heat_attention, WIDE),
    "sana1-5-1-6b-1024px": (3, None, WIDE),
    "sana-sprint-0-6b-1024px": (4, cool_stream, WIDE),
}
#: Prompt tokens of the two guidance branches.
LENGTHS = (3, 77)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def case(request):
    """A transformer with inputs and diffusers' results."""
    variant, (seed, change, size) = VARIANTS[request.param], CHECKPOINTS[request.param]
    transformer = build("transformer", {**variant.transformer, "num_layers": BLOCKS}, seed)
    quieten(transformer)
    if change is not None:
        change(transformer)
    inputs = {size: draw_inputs(transformer.config, size, LENGTHS, variant.alias) for size in (SQUARE, size)}
    unclipped = run_reference(transformer, inputs[SQUARE])
    if variant.clamp:
        clamp_attention(transformer)
    wanted = {size: run_reference(transformer, own) for size, own in inputs.items()}
    clipped = relative_error(unclipped.numpy(), wanted[SQUARE].numpy()) > 0.1
    assert clipped == variant.clamp, "a clip must change the result, and without one nothing may change"
    return SimpleNamespace(variant=variant, transformer=transformer, inputs=inputs, wanted=wanted)


def make_graphs(case, precision) -> Graphs:
    return Graphs(case.transformer.config, case.transformer.state_dict(), precision, clamp=case.variant.clamp)


def test_float32_equals_diffusers(case):
    graphs = make_graphs(case, "float32")
    for size in case.inputs:
        name = f"{case.variant.alias}, {BLOCKS} blocks, {size}, float32"
        assert_equal(name, graphs.run(case.inputs[size]), case.wanted[size])


def test_float16_is_near_diffusers(case):
    graphs = make_graphs(case, "float16")
    for size in case.inputs:
        name = f"{case.variant.alias}, {BLOCKS} blocks, {size}, float16"
        assert_near(name, run_half(name, lambda size=size: graphs.run(case.inputs[size])), case.wanted[size])
