"""Changes the weights of networks with the published widths so that activations get very large or very small.

"Heat" gives them the magnitudes of the published checkpoints, beyond the range of float16. "Cool" makes them so small that the
epsilons of norms matter. Each function changes a network with normal weights in place. The tests assert that it has the effect.
tests/support/hot_checkpoints.py does the same to whole checkpoints with the widths of `tiny-random`.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.support.full_width import seeded

#: The channels in which hot self-attention writes its large outputs.
HOT_CHANNELS = (5, 37, 70, 101)
#: The size of these channels' gates. It makes the clipped outputs add a few units to the stream.
HOT_GATE = 1e-4


@torch.no_grad()
def heat_attention(transformer: Any) -> None:
    """Make self-attention write up to ten times the range of fp16 into a few channels, as in the checkpoints that clip it."""
    channels = torch.tensor(HOT_CHANNELS)
    blocks = transformer.transformer_blocks
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    generator = seeded("heat", width)
    for block in blocks:
        block.attn1.to_out[0].weight[channels] *= 1e5 * len(blocks) ** 0.5
        sign = torch.randint(0, 2, (len(channels),), generator=generator) * 2 - 1
        block.scale_shift_table[2, channels] = sign * HOT_GATE * (0.5 + torch.rand(len(channels), generator=generator))
    # All blocks add the same rows of the time embedding to their gates.
    rows = 2 * width + channels
    transformer.time_embed.linear.weight[rows] *= HOT_GATE
    transformer.time_embed.linear.bias[rows] *= HOT_GATE


@torch.no_grad()
def cool_stream(transformer: Any) -> None:
    """Make the stream 50 times smaller, so that the epsilon of every norm that reads it matters.

    Only for transformers with qk_norm. In the others, cross-attention reads the stream without a norm.
    """
    outputs = [transformer.patch_embed.proj]
    for block in transformer.transformer_blocks:
        outputs += [block.attn1.to_out[0], block.attn2.to_out[0], block.ff.conv_point]
    for layer in outputs:
        layer.weight /= 50
        if layer.bias is not None:
            layer.bias /= 50


@torch.no_grad()
def heat_text_encoder(encoder: Any) -> None:
    """Make the residual stream reach 3e5, most of it in two channels, and the inputs of the post-norms exceed 65504."""
    scale = torch.full((encoder.config.hidden_size,), 6e3)
    scale[[11, 50]] *= 10
    encoder.embed_tokens.weight *= scale
    for layer in encoder.layers:
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
            norm.weight.copy_((1 + norm.weight) * scale - 1)
        # The post-norms undo these factors.
        layer.self_attn.o_proj.weight *= 6e4
        layer.mlp.up_proj.weight *= 30
        layer.mlp.down_proj.weight *= 3e3


@torch.no_grad()
def heat_decoder(decoder: Any) -> None:
    """Make the stream and the convolutions exceed 65504 in every stage of a DC-AE decoder.

    Every other channel inside the residual blocks stays far below, so that SiLU does not act like ReLU. The gates of every other
    attention block stay small too. In the remaining blocks even 1/4096 of the gated product exceeds the range of float16.
    """
    _heat_autoencoder(decoder.conv_in, decoder.up_blocks)


@torch.no_grad()
def heat_encoder(encoder: Any) -> None:
    """Do the same to a DC-AE encoder. Its latents get as large as its stream."""
    _heat_autoencoder(getattr(encoder.conv_in, "conv", encoder.conv_in), encoder.down_blocks)


def _heat_autoencoder(conv_in: Any, stages: Any) -> None:
    stream, quiet, blocks = 1e4, 256, 0
    conv_in.weight *= stream
    conv_in.bias *= stream
    for module in stages.modules():
        kind = type(module).__name__
        if kind in ("DCUpBlock2d", "DCDownBlock2d"):
            module.conv.bias *= stream
        elif kind == "ResBlock":
            module.conv1.weight[::2] /= quiet
            module.conv2.weight[:, ::2] *= quiet
        elif kind == "GLUMBConv":
            blocks += 1
            hidden = module.conv_depth.out_channels // 2
            module.conv_inverted.weight[hidden:] /= quiet
            module.conv_depth.weight[hidden:] *= quiet / (stream if blocks % 2 else 1)
        norm = _norm(module)
        if norm is not None:
            norm.weight *= stream
            norm.bias *= stream


@torch.no_grad()
def cool_decoder(decoder: Any) -> None:
    """Make branches of a DC-AE decoder so small before their norm that its epsilon matters, as in flat areas of an image."""
    for module in decoder.modules():
        kind = type(module).__name__
        if kind == "ResBlock":
            module.conv2.weight *= 0.02
        elif kind == "GLUMBConv":
            module.conv_depth.weight *= 0.1
            module.conv_depth.bias *= 0.1
        elif kind == "SanaMultiscaleLinearAttention":
            module.to_out.weight *= 0.02


def _norm(module: Any) -> Any:
    """The norm at the end of the branch `module`. None if `module` is not a branch."""
    name = {"ResBlock": "norm", "GLUMBConv": "norm", "SanaMultiscaleLinearAttention": "norm_out"}.get(type(module).__name__)
    return None if name is None else getattr(module, name)
