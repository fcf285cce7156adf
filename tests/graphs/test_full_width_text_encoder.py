"""Four layers with the widths of Gemma-2-2B equal transformers in float32 and are close to it in float16."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sana_export.architectures import TEXT_ENCODER
from sana_export.graphs.numerics import FP16_MAX, NUMERICS
from sana_export.graphs.text_encoder import TextEncoder, encode_instruction
from tests.support.full_width import assert_equal, assert_near, build, run_half, seeded
from tests.support.heat import heat_text_encoder

LAYERS = 4
#: Small, because the graph's inputs are rows of the embedding table, not token ids.
VOCABULARY = 300
#: Tokens of the instruction that all prompts share, and tokens of each prompt.
PREFIX, PROMPT = 40, 20


@pytest.fixture(scope="module", params=["normal", "hot"])
@torch.no_grad()
def case(request):
    """An encoder with two prompts and the result of transformers. The hot encoder's residual stream reaches 3e5."""
    cut = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "attn_implementation": "eager"}
    encoder = build("text_encoder", {**TEXT_ENCODER, **cut}, seed=7)
    if request.param == "hot":
        heat_text_encoder(encoder)
    ids = torch.randint(0, VOCABULARY, (2, PREFIX + PROMPT), generator=seeded("text encoder", request.param))
    ids[:, :PREFIX] = ids[0, :PREFIX]
    streams = encoder(ids, output_hidden_states=True).hidden_states
    assert all((stream.abs().max() > 2 * FP16_MAX) == (request.param == "hot") for stream in streams[1:-1])
    config, weights = encoder.config.to_dict(), encoder.state_dict()
    embeds = weights["embed_tokens.weight"][ids]
    prefix, first_row = encode_instruction(config, weights, embeds[0, :PREFIX])
    return SimpleNamespace(
        name=f"{request.param} text encoder, {LAYERS} layers, {PREFIX} + {PROMPT} tokens",
        config=config,
        weights=weights,
        inputs=(embeds[:, PREFIX:], prefix),
        first_row=first_row,
        wanted=streams[-1],
    )


@torch.no_grad()
def test_float32_equals_transformers(case):
    graph = TextEncoder(case.config, case.weights, NUMERICS["float32"])
    assert_equal(f"{case.name}, float32", graph(*case.inputs), case.wanted[:, PREFIX:])
    assert_equal(f"{case.name}, first row", case.first_row, case.wanted[0, 0])


def test_float16_is_near_transformers(case):
    name, graph = f"{case.name}, float16", TextEncoder(case.config, case.weights, NUMERICS["float16"])
    assert_near(name, run_half(name, lambda: graph(*case.inputs)), case.wanted[:, PREFIX:])
