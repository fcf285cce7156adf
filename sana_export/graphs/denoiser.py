"""Sana's linear diffusion transformer for one step, with every guidance branch in one run.

Source: diffusers `SanaTransformer2DModel` and `SanaLinearAttnProcessor2_0`. Perturbed attention follows
`PAGCFGSanaLinearAttnProcessor2_0` (arXiv 2403.17377), plus the query-key norm that diffusers omits there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from sana_export.graphs.gated_conv import gated_conv_halves
from sana_export.graphs.numerics import (
    FP16_MAX,
    MASKED,
    QK_NORM_EPS,
    Conv,
    Linear,
    Numerics,
    linear_attention,
    parameter,
    rms_norm,
    silu,
)

TIME_CHANNELS = 256
#: Latent pixels along the longest side of an image that the position table covers.
LONGEST_AXIS = 512


class Denoiser(nn.Module):
    """latents [B, C, h, w], timestep [1], context, context_mask [U, B, L], perturbed [K] -> noise_pred [K, B, C, h, w].

    With `pag_layers` there is one more input, source int64 [K]: branch k has the prompts of text branch source[k], and if
    perturbed[k] is 1, it uses identity attention in these layers. Before the first of them only the U text branches run: a
    perturbed branch would equal its source. Without `pag_layers`, K = U.

    With a ControlNet of R blocks there is one more input, residuals [R, U, B, h, w, C'] (graphs/controlnet.py): the first is added
    after the second block, and so on.

    A checkpoint with `guidance_embeds` (SANA-Sprint) has one more input, guidance [1]: the guidance scale that the user sets.
    With one branch, timestep and guidance may also be [B, 1], one for each image.

    All tensors are float32 except `context` (see graphs/context.py). context_mask is 1 for tokens to attend to and 0 for padding.
    `clamp` clips self-attention outputs to +-65504, as the fp16 checkpoints were trained. The residual stream is stored multiplied
    by `numerics.scale`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        numerics: Numerics,
        *,
        clamp: bool,
        pag_layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.numerics = numerics
        self.position = PositionTable(config, numerics) if config["interpolation_scale"] is not None else None
        scale = numerics.scale
        patch = weights["patch_embed.proj.weight"].flatten(1)
        self.patch_embed = Linear(patch, weights["patch_embed.proj.bias"], numerics, scale)
        self.time_embed = TimeEmbedding(config, weights, numerics)
        self.blocks = nn.ModuleList(
            Block(config, block_weights(weights, index), numerics, clamp=clamp, perturbable=index in pag_layers)
            for index in range(config["num_layers"])
        )
        self.first_pag_layer = min(pag_layers, default=len(self.blocks))
        self.scale_shift_table = parameter(weights["scale_shift_table"], numerics.dtype)
        self.eps = 1e-6 * scale**2
        self.proj_out = Linear(weights["proj_out.weight"], weights["proj_out.bias"], numerics)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_mask: Tensor,
        perturbed: Tensor,
        *,
        source: Tensor | None = None,
        guidance: Tensor | None = None,
        residuals: Tensor | None = None,
    ) -> Tensor:
        batch, channels, height, width = latents.shape
        branches, dtype, first = perturbed.shape[0], self.numerics.dtype, self.first_pag_layer
        text_branches = branches if source is None else context_mask.shape[0]
        modulation, embedded = self.time_embed(timestep, guidance)
        x = self.patch_embed(latents.to(dtype).flatten(2).transpose(1, 2))
        if self.position is not None:
            x = x + self.position(height, width)
        mask = ((1.0 - context_mask) * MASKED).to(dtype)
        parts = [(context, mask, text_branches)]
        identity = None
        if source is not None:
            after = (context[first:].index_select(2, source), mask.index_select(0, source), branches)
            parts = [(context[:first], mask, text_branches), after]
            # [K] -> [K * B, 1, 1]: the branch is the outer axis.
            identity = (perturbed > 0.5).reshape(-1, 1).expand(-1, batch).reshape(-1, 1, 1)
        conditions = [condition for part in parts for condition in layer_conditions(*part, batch)]
        size = (height, width)
        for index, (module, (keys_values, mask)) in enumerate(zip(self.blocks, conditions, strict=True)):
            block = cast(Block, module)
            table = modulated_table(block.scale_shift_table, modulation)
            if source is not None and index == first:
                # All text branches are identical until the first cross-attention.
                origin = Origin(source, text_branches, batch) if index else Origin(torch.zeros_like(source), 1, batch)
                x = block.self_attention(x, table, identity, origin)
            else:
                x = block.self_attention(x, table, identity)
                x = x if index else expand_branches(x, text_branches)
            x = block.cross_attention(x, keys_values, mask)
            x = block.feed_forward(x, table, size)
            if residuals is not None and 0 < index <= len(residuals):
                residual = residuals[index - 1]
                residual = residual if source is None or index < first else residual.index_select(0, source)
                x = x + residual.flatten(2, 3).flatten(0, 1)
        shift, factor = modulated_table(self.scale_shift_table, embedded)
        x = self.proj_out(modulated_norm(x, shift, factor, self.eps))
        return x.float().transpose(1, 2).reshape(branches, batch, channels, height, width)


class Origin(NamedTuple):
    """Which of U branches each of K branches continues."""

    #: int64 [K], less than U.
    source: Tensor
    #: U.
    branches: int
    #: B, the number of images.
    batch: int

    def continued(self, x: Tensor) -> Tensor:
        """[U * B, ...] -> [K * B, ...]."""
        return x.unflatten(0, (self.branches, self.batch)).index_select(0, self.source).flatten(0, 1)


class Block(nn.Module):
    """One transformer block. Its stream x is [R, N, C]: R is B, U * B or K * B (`Denoiser`)."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        numerics: Numerics,
        *,
        clamp: bool,
        perturbable: bool,
    ) -> None:
        super().__init__()
        scale = numerics.scale
        self.numerics, self.perturbable = numerics, perturbable
        self.limit = FP16_MAX * scale if clamp else None
        self.heads = config["num_attention_heads"]
        self.cross_heads = config["num_cross_attention_heads"]
        self.eps = config["norm_eps"] * scale**2
        self.scale_shift_table = parameter(weights["scale_shift_table"], numerics.dtype)
        self.qkv = parameter(torch.cat([weights[f"attn1.to_{name}.weight"] for name in "qkv"]), numerics.dtype)
        self.out = Linear(weights["attn1.to_out.0.weight"], weights["attn1.to_out.0.bias"], numerics, scale)
        self.qk_norm = config["qk_norm"] is not None
        if self.qk_norm:
            self.query_norm = parameter(weights["attn1.norm_q.weight"].unsqueeze(-1), torch.float32)
            self.key_norm = parameter(weights["attn1.norm_k.weight"].unsqueeze(-1), torch.float32)
            self.cross_query_norm = parameter(weights["attn2.norm_q.weight"], torch.float32)
        self.cross_query = Linear(weights["attn2.to_q.weight"], None, numerics, 1.0 / scale)
        self.cross_query.bias = parameter(weights["attn2.to_q.bias"], numerics.dtype)
        self.cross_out = Linear(weights["attn2.to_out.0.weight"], weights["attn2.to_out.0.bias"], numerics, scale)
        # The value half applies the stream's scale, so the block's output is already scaled.
        self.halves = gated_conv_halves(weights, "ff.", numerics, factor=scale)
        self.point = Conv(weights["ff.conv_point.weight"], None, numerics)

    def self_attention(
        self, x: Tensor, table: tuple[Tensor, ...], identity: Tensor | None = None, origin: Origin | None = None
    ) -> Tensor:
        """identity [K * B, 1, 1] is True for branches with identity attention, if the block is perturbable.

        With `origin`, x are the branches that the K branches continue, and the result has all K: they differ from here on.
        """
        shift, factor, gate = table[:3]
        channels = x.shape[-1]
        y = modulated_norm(x, shift, factor, self.eps).transpose(1, 2)
        query, key, value = (self.qkv @ y).split(channels, dim=1)
        if self.qk_norm:
            query = rms_norm(query, self.query_norm, QK_NORM_EPS, axis=1)
            key = rms_norm(key, self.key_norm, QK_NORM_EPS, axis=1)
        heads = (query.shape[0], self.heads, channels // self.heads, -1)
        attention = linear_attention(query.reshape(heads), key.reshape(heads), value.reshape(heads), self.numerics).flatten(1, 2)
        if origin is not None:
            x, attention, value = map(origin.continued, (x, attention, value))
        if self.perturbable and identity is not None:
            attention = torch.where(identity, value, attention)
        out = self.out(attention.transpose(1, 2))
        if self.limit is not None:
            out = out.clamp(-self.limit, self.limit)
        return x + gate * out

    def cross_attention(self, x: Tensor, keys_values: Tensor, mask: Tensor) -> Tensor:
        """keys_values [2, R, heads, L, dim], mask [R, 1, 1, L]."""
        query = self.cross_query(x)
        if self.qk_norm:
            query = rms_norm(query, self.cross_query_norm, QK_NORM_EPS)
        query = query.unflatten(-1, (self.cross_heads, -1)).transpose(1, 2)
        key, value = keys_values.unbind(0)
        weights = (query @ key.transpose(-1, -2) + mask).softmax(-1)
        return x + self.cross_out((weights @ value).transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor, table: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        shift, factor, gate = table[3:]
        # Sizes first, then the channels: a GPU's convolutions read [B, H, W, C], so both permutations are free there. The other
        # order, [B, C, N] to [B, C, H, W], makes the compiler copy (docs/step.md).
        y = modulated_norm(x, shift, factor, self.eps).unflatten(1, size).permute(0, 3, 1, 2)
        y = self.point(self.halves["value"](y) * silu(self.halves["gate"](y)))
        return x + gate * y.permute(0, 2, 3, 1).flatten(1, 2)


class TimeEmbedding(nn.Module):
    """timestep [1] and, if the config has `guidance_embeds`, guidance [1] (float32) -> modulation [6, C] and embedding [1, C].

    For [B, 1], one for each image, modulation is [6, B, 1, C] and the embedding [1, B, 1, C].

    Source: diffusers `AdaLayerNormSingle` and `SanaCombinedTimestepGuidanceEmbeddings`.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        guided = config["guidance_embeds"]
        prefix = "time_embed." if guided else "time_embed.emb."
        self.timestep = WaveEmbedding(weights, f"{prefix}timestep_embedder.linear_", numerics)
        # diffusers' pipeline multiplies the guidance scale by this factor before it calls the transformer.
        factor = config["guidance_embeds_scale"]
        self.guidance = WaveEmbedding(weights, f"{prefix}guidance_embedder.linear_", numerics, factor) if guided else None
        self.linear = Linear(weights["time_embed.linear.weight"], weights["time_embed.linear.bias"], numerics)

    def forward(self, timestep: Tensor, guidance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        embedded = self.timestep(timestep)
        if self.guidance is not None:
            embedded = embedded + self.guidance(guidance)
        modulation = self.linear(silu(embedded))
        if timestep.ndim > 1:
            return modulation.unflatten(-1, (6, -1)).permute(2, 0, 1, 3), embedded.unsqueeze(0)
        return modulation.reshape(6, -1), embedded


class WaveEmbedding(nn.Module):
    """A float32 number [1] -> [1, C]: cosines and sines of the number times `factor`, then two linear layers.

    Source: diffusers `Timesteps` and `TimestepEmbedding`.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, numerics: Numerics, factor: float = 1.0) -> None:
        super().__init__()
        half = TIME_CHANNELS // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        self.frequencies = parameter(frequencies * factor, torch.float32)
        self.linear_1 = Linear(weights[f"{prefix}1.weight"], weights[f"{prefix}1.bias"], numerics)
        self.linear_2 = Linear(weights[f"{prefix}2.weight"], weights[f"{prefix}2.bias"], numerics)

    def forward(self, number: Tensor) -> Tensor:
        angles = number.unsqueeze(-1) * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        out: Tensor = self.linear_2(silu(self.linear_1(waves)))
        return out


class PositionTable(nn.Module):
    """Sinusoidal position embedding [h * w, C] for latents of up to 512x512, with coordinates in units of the native grid.

    Source: diffusers `get_2d_sincos_pos_embed`.
    """

    def __init__(self, config: Mapping[str, Any], numerics: Numerics) -> None:
        super().__init__()
        quarter = config["num_attention_heads"] * config["attention_head_dim"] // 4
        exponent = torch.arange(quarter, dtype=torch.float64) / quarter
        self.frequencies = parameter(1.0 / 10000**exponent, torch.float32)
        self.positions = parameter(torch.arange(LONGEST_AXIS), torch.float32)
        self.native = config["sample_size"] / config["interpolation_scale"]
        self.numerics = numerics

    def forward(self, height: int, width: int) -> Tensor:
        columns = self.axis(width).unsqueeze(0).expand(height, -1, -1)
        rows = self.axis(height).unsqueeze(1).expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)

    def axis(self, count: int) -> Tensor:
        """[count, C / 2]: sines and cosines along one axis.

        The size is read from the last position and not from `count`. As a number it would come from the host, and ONNX Runtime
        captures no graph into which a number is copied.
        """
        position = self.positions[:count]
        coordinate = position * self.native / (position[-1:] + 1.0)
        angles = coordinate.unsqueeze(-1) * self.frequencies
        table = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return (table * self.numerics.scale).to(self.numerics.dtype)


def modulated_table(table: Tensor, modulation: Tensor) -> tuple[Tensor, ...]:
    """The rows of `table` [n, C] plus `modulation`, which is [1 or n, C], or [1 or n, B, 1, C] with one for each image."""
    table = table if modulation.ndim == 2 else table[:, None, None]
    return (table + modulation).unbind(0)


def modulated_norm(x: Tensor, shift: Tensor, factor: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + factor) + shift over the last axis of [B, N, C]; shift and factor are [C] or [B, 1, C]."""
    if shift.ndim > 1:
        return layer_norm(x, x.shape[-1:], eps=eps) * (1.0 + factor) + shift
    return layer_norm(x, x.shape[-1:], 1.0 + factor, shift, eps)


def layer_conditions(context: Tensor, mask: Tensor, branches: int, batch: int) -> list[tuple[Tensor, Tensor]]:
    """For each layer of `context` [layers, 2, branches, batch, heads, L, dim] what `Block.cross_attention` takes."""
    mask = mask.reshape(branches * batch, 1, 1, -1)
    return [(keys_values, mask) for keys_values in (context.flatten(2, 3).unbind(0) if len(context) else ())]


def expand_branches(x: Tensor, branches: int) -> Tensor:
    """[B, N, C] repeated to [branches * B, N, C]."""
    return x.unsqueeze(0).expand(branches, -1, -1, -1).flatten(0, 1)


def block_weights(weights: Mapping[str, Tensor], index: int) -> Mapping[str, Tensor]:
    """The tensors of block `index` by their names in it."""
    prefix = f"transformer_blocks.{index}."
    return {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
