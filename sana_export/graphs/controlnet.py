"""Sana's ControlNet for one step: what a control image adds to the denoiser's blocks.

Source: diffusers `SanaControlNetModel`. Its cross-attention keys and values are computed once per prompt, by `Context`, as the
denoiser's are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sana_export.graphs.denoiser import Block, PositionTable, TimeEmbedding, block_weights, expand_branches
from sana_export.graphs.numerics import MASKED, Linear, Numerics, parameter


class ControlNet(nn.Module):
    """latents, control [B, C, h, w], timestep, conditioning_scale [1], context, context_mask [K, B, L] -> residuals.

    `control` is the latents of the control image, times the autoencoder's scaling factor. residuals [R, K, B, h, w, C'] are in the
    graph's precision, stored multiplied by its scale like the denoiser's stream, one for each block here. The denoiser adds the
    first to its stream after its second block, and so on. All other tensors are float32 except `context`, which has R layers.
    `clamp` clips self-attention outputs to +-65504.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics, *, clamp: bool) -> None:
        super().__init__()
        self.numerics, scale = numerics, numerics.scale
        patch, bias = weights["patch_embed.proj.weight"].flatten(1), weights["patch_embed.proj.bias"]
        self.latents_embed = Linear(patch, bias, numerics, scale)
        self.control_embed = Linear(patch, bias, numerics)
        self.control_in = Linear(weights["input_block.weight"], weights["input_block.bias"], numerics, scale)
        self.position = PositionTable(config, numerics) if config["interpolation_scale"] is not None else None
        self.time_embed = TimeEmbedding(config, weights, numerics)
        self.blocks = nn.ModuleList(
            Block(config, block_weights(weights, index), numerics, clamp=clamp, perturbable=False)
            for index in range(config["num_layers"])
        )
        self.outputs = nn.ModuleList(
            _residual(weights, f"controlnet_blocks.{index}", numerics) for index in range(config["num_layers"])
        )

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        control: Tensor,
        conditioning_scale: Tensor,
        context: Tensor,
        context_mask: Tensor,
    ) -> Tensor:
        branches, batch, _ = context_mask.shape
        dtype, size = self.numerics.dtype, (latents.shape[2], latents.shape[3])
        modulation, _ = self.time_embed(timestep)
        x = self.latents_embed(_tokens(latents, dtype))
        y = self.control_embed(_tokens(control, dtype))
        if self.position is not None:
            position = self.position(*size)
            x, y = x + position, y + position * (1.0 / self.numerics.scale)
        x = x + self.control_in(y)
        mask = ((1.0 - context_mask) * MASKED).to(dtype).reshape(branches * batch, 1, 1, -1)
        residuals = []
        layers = zip(self.blocks, self.outputs, context.flatten(2, 3).unbind(0), strict=True)
        for index, (module, output, keys_values) in enumerate(layers):
            block = cast(Block, module)
            table = (block.scale_shift_table + modulation).unbind(0)
            x = block.self_attention(x, table)
            x = x if index else expand_branches(x, branches)  # all branches are identical until the first cross-attention
            x = block.cross_attention(x, keys_values, mask)
            x = block.feed_forward(x, table, size)
            residuals.append(output(x))
        stacked = torch.stack(residuals) * conditioning_scale.to(dtype)
        return stacked.unflatten(1, (branches, batch)).unflatten(3, size)


def _tokens(latents: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, C, h, w] -> [B, h * w, C]."""
    return latents.to(dtype).flatten(2).transpose(1, 2)


def _residual(weights: Mapping[str, Tensor], name: str, numerics: Numerics) -> Linear:
    """A linear layer whose input and output are both stored multiplied by the scale."""
    linear = Linear(weights[f"{name}.weight"], None, numerics)
    linear.bias = parameter(weights[f"{name}.bias"].float() * numerics.scale, numerics.dtype)
    return linear
