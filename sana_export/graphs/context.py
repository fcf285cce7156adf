"""The cross-attention keys and values of every denoiser layer, computed once per prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from sana_export.graphs.numerics import QK_NORM_EPS, Linear, Numerics, parameter, rms_norm

CAPTION_NORM_EPS = 1e-5


class Context(nn.Module):
    """prompt_embeds float32 [K, B, L, C_text] -> context [layers, 2, K, B, heads, L, dim] in the graph's dtype.

    The keys already include the softmax's factor dim ** -0.5, so the denoiser's logits are a plain product. Source: diffusers
    `SanaTransformer2DModel` (caption_projection, caption_norm) and `SanaAttnProcessor2_0`.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        self.layers = config["num_layers"]
        self.heads, self.dim = config["num_cross_attention_heads"], config["cross_attention_head_dim"]
        self.linear_1 = _linear(weights, "caption_projection.linear_1", numerics)
        self.linear_2 = _linear(weights, "caption_projection.linear_2", numerics)
        self.caption_norm = parameter(weights["caption_norm.weight"], torch.float32)
        self.qk_norm = config["qk_norm"] is not None
        factor = self.dim**-0.5
        blocks = [f"transformer_blocks.{index}.attn2." for index in range(self.layers)]
        key_factor = 1.0 if self.qk_norm else factor
        self.projection = Linear(
            torch.cat([_pair(weights, block, "weight", key_factor).to(numerics.dtype) for block in blocks]),
            torch.cat([_pair(weights, block, "bias", key_factor) for block in blocks]),
            numerics,
        )
        if self.qk_norm:
            norms = torch.stack([weights[block + "norm_k.weight"].float() * factor for block in blocks])
            self.key_norm = parameter(norms, torch.float32)

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        branches, batch, tokens, _ = prompt_embeds.shape
        x = self.linear_2(gelu(self.linear_1(prompt_embeds.to(self.numerics.dtype)), approximate="tanh"))
        x = self.projection(rms_norm(x, self.caption_norm, CAPTION_NORM_EPS))
        if self.qk_norm:
            key, value = x.reshape(branches, batch, tokens, self.layers, 2, -1).unbind(4)
            x = torch.stack([rms_norm(key, self.key_norm, QK_NORM_EPS), value], dim=4)
        x = x.reshape(branches, batch, tokens, self.layers, 2, self.heads, self.dim)
        return x.permute(3, 4, 0, 1, 5, 2, 6)


def _linear(weights: Mapping[str, Tensor], name: str, numerics: Numerics) -> Linear:
    return Linear(weights[f"{name}.weight"], weights[f"{name}.bias"], numerics)


def _pair(weights: Mapping[str, Tensor], block: str, kind: str, key_factor: float) -> Tensor:
    return torch.cat([weights[f"{block}to_k.{kind}"].float() * key_factor, weights[f"{block}to_v.{kind}"].float()])
