"""The text encoder equals transformers' Gemma2Model (attn_implementation "eager") in float32."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2Model

from sana_export.graphs.numerics import NUMERICS
from sana_export.graphs.text_encoder import TextEncoder, encode_instruction

BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 48,
    # Low, so that a graph without soft-capping would be far off.
    "attn_logit_softcapping": 2.0,
    "attn_implementation": "eager",
}
CONFIGS = {
    "plain": {},
    "no grouping of heads": {"num_key_value_heads": 4},
    "one key head": {"num_key_value_heads": 1},
    "no soft cap": {"attn_logit_softcapping": None},
    "other rotary base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
}


def make_model(config: dict) -> Gemma2Model:
    model = Gemma2Model(Gemma2Config(**{**BASE, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.15))
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("past", [1, 6, 17])
@torch.no_grad()
def test_equals_transformers_after_any_prefix(config, past):
    model = make_model(config)
    ids = torch.randint(0, 300, (3, 24))
    ids[:, :past] = ids[0, :past]
    wanted = model(ids).last_hidden_state
    weights, stored = model.state_dict(), model.config.to_dict()
    table = weights["embed_tokens.weight"]
    prefix, bos_row = encode_instruction(stored, weights, table[ids[0, :past]])
    found = TextEncoder(stored, weights, NUMERICS["float32"])(table[ids[:, past:]], prefix)
    for left, right in ((found, wanted[:, past:]), (bos_row, wanted[0, 0])):
        cosine = torch.nn.functional.cosine_similarity(left.double().flatten(), right.double().flatten(), dim=0)
        assert cosine >= 0.999999
        assert (left - right).abs().max() <= 2e-5 * right.abs().max()


@torch.no_grad()
def test_right_padding_does_not_change_the_rows_before_it():
    model = make_model({})
    weights, stored = model.state_dict(), model.config.to_dict()
    ids = torch.randint(0, 300, (2, 12))
    ids[1, 0] = ids[0, 0]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    wanted = model(ids, attention_mask=mask).last_hidden_state
    embeds = weights["embed_tokens.weight"][ids]
    embeds[1, 5:] = 0.0
    prefix = encode_instruction(stored, weights, embeds[0, :1])[0]
    found = TextEncoder(stored, weights, NUMERICS["float32"])(embeds[:, 1:], prefix)
    assert torch.isfinite(found).all()
    assert (found[0] - wanted[0, 1:]).abs().max() <= 2e-5 * wanted.abs().max()
    assert (found[1, :4] - wanted[1, 1:5]).abs().max() <= 2e-5 * wanted.abs().max()
