"""Makes checkpoints from the `tiny-random` recipe whose activations exceed the range of fp16, as in the published ones.

Each gives a good image in float32 (the first one with its clamp), and all its weights are finite in fp16. Tests measure how large
the activations get (`measure_ranges`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sana_export.graphs.numerics import FP16_MAX
from sana_export.synth.checkpoint import build_pipeline, write_pipeline
from sana_export.synth.recipes import RECIPES
from tests.support.heat import HOT_CHANNELS, heat_text_encoder

SEED = 0


@dataclass(frozen=True)
class Range:
    """The outputs of one module over all calls."""

    #: Largest magnitude, or NaN if there was one.
    max_abs: float
    #: Share of values that exceed the range of fp16.
    overflow_share: float


def measure_ranges(model: torch.nn.Module, pattern: str, call: Any) -> dict[str, Range]:
    """Run `call()` and return the range of the outputs of the modules of `model` whose names match `pattern`, by name."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            value = (output[0] if isinstance(output, tuple) else output).detach().float()
            share = (value.abs() > FP16_MAX).float().mean()
            seen.setdefault(name, []).append(torch.stack([value.abs().max(), share]))

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if re.search(pattern, name)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    ranges = {}
    for name, rows in seen.items():
        largest, share = torch.stack(rows).T
        ranges[name] = Range(largest.max().item(), share.mean().item())
    return ranges


def _write(pipeline: Any, folder: Path, kind: str, dtype: str) -> Path:
    marker = {"synthetic": True, "recipe": f"tiny ({kind})", "seed": SEED}
    return write_pipeline(pipeline, folder, marker, dtype=dtype)


@torch.no_grad()
def make_hot_attention(folder: Path) -> Path:
    """A checkpoint with the clamp, stored in fp16: self-attention writes up to ten times 65504 to a few channels.

    Their gates are about 1e-4, so the clamped values add a few units to the stream. Without the clamp they would dominate it.
    """
    pipeline = build_pipeline(RECIPES["tiny-random"], SEED)
    transformer = pipeline.transformer
    channels = torch.tensor(HOT_CHANNELS)
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    generator = torch.Generator().manual_seed(SEED)
    for block in transformer.transformer_blocks:
        block.attn1.to_v.weight *= 8
        block.attn1.to_out[0].weight /= 8
        block.attn1.to_out[0].weight[channels] *= 2.4e5
        sign = torch.randint(0, 2, (len(channels),), generator=generator) * 2 - 1
        block.scale_shift_table[2, channels] = sign * 1e-4 * (0.5 + torch.rand(len(channels), generator=generator))
    gate_rows = 2 * width + channels
    transformer.time_embed.linear.weight[gate_rows] *= 1e-4
    transformer.time_embed.linear.bias[gate_rows] *= 1e-4
    return _write(pipeline, folder, "hot attention", "float16")


@torch.no_grad()
def make_hot_text_encoder(folder: Path) -> Path:
    """A Gemma-2 whose residual stream reaches 3e5, mostly in two channels, and whose post-norm inputs exceed 65504.

    Every sublayer reads the stream through a norm, so the scale does not change the function. The hot channels do.
    """
    pipeline = build_pipeline(RECIPES["tiny-random"], SEED)
    heat_text_encoder(pipeline.text_encoder)
    return _write(pipeline, folder, "hot text encoder", "float32")


@torch.no_grad()
def make_hot_vae(folder: Path) -> Path:
    """A DC-AE decoder whose stream and convolutions exceed 65504 in every stage, up to about 5e5.

    Gates and half of the channels inside the residual blocks stay far below that, so that silu differs from relu.
    """
    pipeline = build_pipeline(RECIPES["tiny-random"], SEED)
    decoder = pipeline.vae.decoder
    stream, quiet = 1e4, 256
    decoder.conv_in.weight *= stream
    decoder.conv_in.bias *= stream
    for module in decoder.modules():
        kind = type(module).__name__
        if kind == "DCUpBlock2d":
            module.conv.bias *= stream
        if kind == "ResBlock":
            _heat_norm(module.norm, stream)
            module.conv1.weight[::2] /= quiet
            module.conv2.weight[:, ::2] *= quiet
        if kind == "GLUMBConv":
            _heat_norm(module.norm, stream)
            hidden = module.conv_depth.out_channels // 2
            module.conv_inverted.weight[hidden:] /= quiet
            module.conv_depth.weight[hidden:] *= quiet / stream
        if kind == "SanaMultiscaleLinearAttention":
            _heat_norm(module.norm_out, stream)
    return _write(pipeline, folder, "hot vae", "float32")


def _heat_norm(norm: Any, scale: float) -> None:
    norm.weight *= scale
    norm.bias *= scale


HOT_CHECKPOINTS = {
    "attention": make_hot_attention,
    "text_encoder": make_hot_text_encoder,
    "vae": make_hot_vae,
}


def make_all_hot(folder: Path) -> Path:
    """The checkpoint with hot attention and with the hot components of the two others."""
    make_hot_attention(folder)
    for component in ("text_encoder", "vae"):
        other = HOT_CHECKPOINTS[component](folder.with_name(f"{folder.name}-{component}"))
        shutil.rmtree(folder / component)
        shutil.move(other / component, folder / component)
        shutil.rmtree(other)
    return folder
