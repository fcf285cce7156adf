"""One step of the whole Sana 600M (28 layers, 512 px) equals diffusers in float32 and is close to it in float16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sana_export.variants import VARIANTS
from sana_export.verify.reference import clamp_attention
from tests.support.full_width import assert_equal, assert_near, build, run_half
from tests.support.heat import heat_attention
from tests.support.transformer_cases import Graphs, draw_inputs, quieten, run_reference

#: test_full_width.py computes three blocks of this width in every run.
pytestmark = pytest.mark.slow

VARIANT = VARIANTS["sana-600m-512px"]
#: Latent height and width, and the prompt's tokens. test_full_width.py covers several branches and sizes.
SIZE, LENGTHS = (16, 16), (120,)


@pytest.fixture(scope="module")
def case():
    """The weights in float16, as published, with inputs and diffusers' result in float32.

    To save memory, the float32 weights of the reference are gone before the graph is built.
    """
    transformer = build("transformer", VARIANT.transformer, seed=5)
    quieten(transformer)
    heat_attention(transformer)
    clamp_attention(transformer)
    inputs = draw_inputs(transformer.config, SIZE, LENGTHS, "whole")
    wanted = run_reference(transformer.half().float(), inputs)
    return SimpleNamespace(config=transformer.config, weights=transformer.half().state_dict(), inputs=inputs, wanted=wanted)


def test_float32_equals_diffusers(case):
    graphs = Graphs(case.config, case.weights, "float32", clamp=VARIANT.clamp)
    assert_equal(f"{VARIANT.alias}, whole, {SIZE}, float32", graphs.run(case.inputs), case.wanted)


def test_float16_is_near_diffusers(case):
    name, graphs = f"{VARIANT.alias}, whole, {SIZE}, float16", Graphs(case.config, case.weights, "float16", clamp=VARIANT.clamp)
    assert_near(name, run_half(name, lambda: graphs.run(case.inputs)), case.wanted)
