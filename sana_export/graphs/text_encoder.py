"""Gemma-2 as Sana uses it: one causal pass over the prompt, with the keys and values of the instruction precomputed.

Source: transformers `modeling_gemma2.py` with attn_implementation "eager", the only one that applies the soft-capping of attention
from the paper (arXiv 2408.00118).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from sana_export.graphs.numerics import MASKED, NUMERICS, Linear, Numerics, parameter, rms_norm

#: The keys and values of earlier tokens if there are none.
NOTHING = (None, None)


class TextEncoder(nn.Module):
    """The last hidden state float32 [B, S, C] of prompt tokens that follow a common prefix.

    inputs_embeds: float32 [B, S, C], rows of the embedding table as stored. prefix: float32 [layers, 2, kv_heads, P, head_dim],
    the keys (after rotation) and values of the P >= 1 tokens before the prompt, the same for the whole batch. Prompts are padded on
    the right. Attention is causal, so padding needs no mask.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        self.embedding_scale = float(config["hidden_size"]) ** 0.5
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(
            GemmaLayer(config, _layer_weights(weights, index), numerics) for index in range(config["num_hidden_layers"])
        )
        self.norm = Norm(weights["norm.weight"], config["rms_norm_eps"], numerics, scaled_input=True)

    def forward(self, inputs_embeds: Tensor, prefix: Tensor) -> Tensor:
        tokens, past = inputs_embeds.shape[1], prefix.shape[3]
        positions = past + torch.arange(tokens, device=inputs_embeds.device)
        mask = causal_mask(tokens, past, self.numerics.dtype, inputs_embeds.device)
        return self.encode(inputs_embeds, positions, mask, prefix)

    def encode(self, inputs_embeds: Tensor, positions: Tensor, mask: Tensor, prefix: Tensor | None = None) -> Tensor:
        """The last hidden state of tokens at `positions` [S] with the additive `mask` over keys, [..., S, P + S].

        Without `prefix` there are no tokens before them.
        """
        rotation = self.rotary(positions, self.numerics.dtype)
        x = (inputs_embeds * (self.embedding_scale * self.numerics.scale)).to(self.numerics.dtype)
        past: Sequence[tuple[Tensor | None, ...]] = [NOTHING] * len(self.layers)
        if prefix is not None:
            past = [keys_values.unbind(0) for keys_values in prefix.to(self.numerics.dtype).unbind(0)]
        for layer, keys_values in zip(self.layers, past, strict=True):
            x, _ = layer(x, *keys_values, rotation, mask)
        return self.norm(x).float()


class GemmaLayer(nn.Module):
    """One decoder layer. The residual stream is stored multiplied by `numerics.scale`."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        eps = config["rms_norm_eps"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.softcap = config["attn_logit_softcapping"]
        self.input_norm = Norm(weights["input_layernorm.weight"], eps, numerics, scaled_input=True)
        self.qkv = Linear(torch.cat([weights[f"self_attn.{name}_proj.weight"] for name in "qkv"]), None, numerics)
        self.out = Linear(weights["self_attn.o_proj.weight"], None, numerics, scale=numerics.scale)
        self.attention_norm = Norm(weights["post_attention_layernorm.weight"], eps, numerics, scaled_input=True, scaled_output=True)
        self.mlp_norm = Norm(weights["pre_feedforward_layernorm.weight"], eps, numerics, scaled_input=True)
        self.gate = Linear(weights["mlp.gate_proj.weight"], None, numerics)
        self.up = Linear(weights["mlp.up_proj.weight"], None, numerics, scale=numerics.scale)
        self.down = Linear(weights["mlp.down_proj.weight"], None, numerics)
        self.feedforward_norm = Norm(
            weights["post_feedforward_layernorm.weight"], eps, numerics, scaled_input=True, scaled_output=True
        )

    def forward(
        self, x: Tensor, past_key: Tensor | None, past_value: Tensor | None, rotation: Rotation, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x is [B, S, C], past_key and past_value are [kv_heads, P, D], or None if there are no earlier tokens.

        Returns the next x, and the keys and values [2, B, kv_heads, S, D] that the layer computed from this one.
        """
        attention, own = self.attention(self.input_norm(x), past_key, past_value, rotation, mask)
        x = x + self.attention_norm(self.out(attention))
        y = self.mlp_norm(x)
        product = gelu(self.gate(y), approximate="tanh") * self.up(y)
        return x + self.feedforward_norm(self.down(product)), own

    def attention(
        self, y: Tensor, past_key: Tensor | None, past_value: Tensor | None, rotation: Rotation, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, tokens, _ = y.shape
        split = self.qkv(y).reshape(batch, tokens, -1, self.head_dim).transpose(1, 2)
        query, key, value = split.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        query_table, key_table = rotation
        query, key = rotate(query, query_table), rotate(key, key_table)
        all_keys, all_values = _after(past_key, key), _after(past_value, value)
        # Query heads that share a key head are adjacent, so they can be the rows of one product.
        groups = self.heads // self.kv_heads
        query = query.reshape(batch, self.kv_heads, groups * tokens, self.head_dim)
        logits = query @ all_keys.transpose(-1, -2)
        if self.softcap is not None:
            logits = torch.tanh(logits) * self.softcap
        logits = logits.reshape(batch, self.kv_heads, groups, tokens, -1) + mask
        weights = logits.softmax(-1).reshape(batch, self.kv_heads, groups * tokens, -1)
        out = (weights @ all_values).reshape(batch, self.heads, tokens, self.head_dim)
        return out.transpose(1, 2).reshape(batch, tokens, -1), torch.stack([key, value])


def _after(past: Tensor | None, own: Tensor) -> Tensor:
    """`own` [B, kv_heads, S, D] after the rows of `past` [kv_heads, P, D], which the whole batch shares."""
    return own if past is None else torch.cat([past.expand(own.shape[0], -1, -1, -1), own], dim=2)


class Norm(nn.Module):
    """Gemma's RMSNorm, x / rms(x) * (1 + weight). Input and output may be stored multiplied by the scale."""

    def __init__(
        self,
        weight: Tensor,
        eps: float,
        numerics: Numerics,
        *,
        scaled_input: bool = False,
        scaled_output: bool = False,
    ) -> None:
        super().__init__()
        self.eps, self.scale = eps, numerics.scale if scaled_input else 1.0
        factor = (numerics.scale if scaled_output else 1.0) / self.scale
        self.weight = parameter((1.0 + weight.float()) * factor, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, scale=self.scale)


#: (cos, sin) for queries, then for keys. Each is [S, D].
Rotation = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


class Rotary(nn.Module):
    """Rotary position tables. The queries' table includes the constant factor of the logits, query scale / soft cap."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        dim = config["head_dim"]
        self.frequencies = parameter(
            1.0 / (config["rope_parameters"]["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), torch.float32
        )
        self.query_scale = config["query_pre_attn_scalar"] ** -0.5 / (config["attn_logit_softcapping"] or 1.0)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = positions.float().unsqueeze(-1) * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        scale = self.query_scale
        return ((cos * scale).to(dtype), (sin * scale).to(dtype)), (cos.to(dtype), sin.to(dtype))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, heads, S, D] by (cos, sin) [S, D] (arXiv 2104.09864)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def causal_mask(tokens: int, past: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Additive mask [S, P + S]: 0 at (i, j) if j <= P + i, otherwise `MASKED`."""
    row = torch.arange(tokens, device=device).unsqueeze(-1) + past
    column = torch.arange(past + tokens, device=device).unsqueeze(0)
    return (column > row).to(dtype) * MASKED


@torch.no_grad()
def encode_instruction(config: Mapping[str, Any], weights: Mapping[str, Tensor], inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence that starts at position 0, and the first row (BOS) of its last hidden state.

    inputs_embeds: float32 [S, C], rows of the embedding table. Returns float32 [layers, 2, kv_heads, S, D] and [C]. Computes in
    float32 with one layer in memory at a time.
    """
    numerics = NUMERICS["float32"]
    tokens = inputs_embeds.shape[0]
    rotation = Rotary(config)(torch.arange(tokens), torch.float32)
    mask = causal_mask(tokens, 0, torch.float32)
    x = inputs_embeds.unsqueeze(0) * float(config["hidden_size"]) ** 0.5
    prefix = []
    for index in range(config["num_hidden_layers"]):
        x, own = GemmaLayer(config, _layer_weights(weights, index), numerics)(x, *NOTHING, rotation, mask)
        prefix.append(own[:, 0])
    last = Norm(weights["norm.weight"], config["rms_norm_eps"], numerics)(x)
    return torch.stack(prefix), last[0, 0]


def _layer_weights(weights: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
    prefix = f"layers.{index}."
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
