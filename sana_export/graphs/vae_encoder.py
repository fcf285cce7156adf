"""The DC-AE encoder (arXiv 2410.10733): image to latents.

Source: diffusers `AutoencoderDC`, as far as supported.py accepts its config. As in the decoder (vae_decoder.py), every stream,
convolution and attention output is stored multiplied by `numerics.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana_export.checkpoint.vae_config import EncoderConfig, read_encoder
from sana_export.graphs.numerics import Conv, Numerics, parameter
from sana_export.graphs.vae_blocks import BLOCKS, ChannelNorm


class VaeEncoder(nn.Module):
    """image float32 [B, 3, H, W], values in [-1, 1] -> latents float32 [B, C, H / 32, W / 32].

    The latents are the sampler's: they are multiplied by the VAE's scaling factor. H and W are multiples of 32 (of 2 to the number
    of stages minus 1 in other autoencoders).
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        self.head = VaeEncoderHead(config, weights, numerics)
        self.tail = VaeEncoderTail(config, weights, numerics)

    def forward(self, image: Tensor) -> Tensor:
        return self.tail.latents(self.head.stored_features(image))


class VaeEncoderHead(nn.Module):
    """The stages before the first one with attention: a window of the image -> its features.

    window float32 [B, 3, s h, s w] -> features float32 [B, C', h, w]. In the published encoder C' = 512 and s = 8. The features
    equal those of the whole image except within `encoder_halo` features of a window border that is not a border of the image: there
    the convolutions read zero padding instead of the missing pixels.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        encoder, weights = read_encoder(config), _encoder_weights(weights)
        self.dtype, self.scale = numerics.dtype, numerics.scale
        self.conv_in: nn.Module
        if encoder.stages[0].depth:
            self.conv_in = Conv(weights["conv_in.weight"], weights["conv_in.bias"], numerics, bias_scale=numerics.scale)
        else:
            self.conv_in = Downsample(encoder.downsample, weights, "conv_in.conv", numerics, shortcut=False)
        stages = range(encoder.local_stages)
        self.stages = nn.Sequential(*(_build_stage(encoder, weights, stage, numerics) for stage in stages))

    def forward(self, window: Tensor) -> Tensor:
        # A power of two: dividing it out and multiplying it again in the tail loses nothing.
        return self.stored_features(window).float() * (1.0 / self.scale)

    def stored_features(self, window: Tensor) -> Tensor:
        """The features as the tail computes with them: in the graph's precision, multiplied by its scale."""
        features: Tensor = self.stages(self.conv_in((window * self.scale).to(self.dtype)))
        return features


class VaeEncoderTail(nn.Module):
    """The other stages: features float32 [B, C', s' h, s' w] -> latents float32 [B, C, h, w]. In the published encoder s' = 4.

    Without attention (an encoder of residual blocks only) the tail is the last convolution alone, and s' = 1.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        encoder, weights = read_encoder(config), _encoder_weights(weights)
        self.dtype, self.scale, self.factor = numerics.dtype, numerics.scale, encoder.scaling_factor / numerics.scale
        stages = range(encoder.local_stages, len(encoder.stages))
        self.stages = nn.Sequential(*(_build_stage(encoder, weights, stage, numerics) for stage in stages))
        kernel = weights["conv_out.weight"]
        kernel = _with_average(kernel) if encoder.out_shortcut else kernel
        self.conv_out = Conv(kernel, weights["conv_out.bias"], numerics, bias_scale=numerics.scale)

    def forward(self, features: Tensor) -> Tensor:
        return self.latents((features * self.scale).to(self.dtype))

    def latents(self, features: Tensor) -> Tensor:
        """The latents of features that are in the graph's precision and multiplied by its scale."""
        latents: Tensor = self.conv_out(self.stages(features)).float() * self.factor
        return latents


class Downsample(nn.Module):
    """Halves the size, [B, C, 2 H, 2 W] -> [B, C', H, W], as diffusers' `DCDownBlock2d` of `kind` with the convolution `name`.

    "Conv" is a 3x3 convolution of stride 2, whose output pixel i reads rows 2 i - 1 to 2 i + 1. "pixel_unshuffle" is a 3x3
    convolution that then moves 2x2 pixels to channels. That is a 4x4 convolution of stride 2, which reads rows 2 i - 1 to 2 i + 2:
    more work, but no tensor of four times the size. The shortcut moves 2x2 pixels of the input to channels and averages groups of
    g = 4 C / C' of them, so it adds 1 / g to taps 1 and 2 of either kernel.
    """

    def __init__(self, kind: str, weights: Mapping[str, Tensor], name: str, numerics: Numerics, *, shortcut: bool) -> None:
        super().__init__()
        kernel, bias = weights[f"{name}.weight"].float(), weights[f"{name}.bias"].float()
        if kind == "pixel_unshuffle":
            kernel, bias = _unshuffled(kernel), bias.repeat_interleave(4)
        kernel = _with_average_of_pixels(kernel) if shortcut else kernel
        self.weight, self.bias = parameter(kernel, numerics.dtype), parameter(bias * numerics.scale, numerics.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, stride=2, padding=1)


def encoder_feature_channels(config: Mapping[str, Any]) -> int:
    """Channels of the features that go from the head to the tail."""
    encoder = read_encoder(config)
    return encoder.stages[min(encoder.local_stages, len(encoder.stages) - 1)].channels


def encoder_tile_scale(config: Mapping[str, Any]) -> int:
    """Image pixels per feature, in height and in width. Every stage except the lowest halves both."""
    encoder = read_encoder(config)
    return int(2 ** min(encoder.local_stages, len(encoder.stages) - 1))


def encoder_halo(head: VaeEncoderHead, scale: int) -> int:
    """The number of neighboring features, of `scale` pixels each, on each side that a feature of `head` depends on.

    Walks from the features back to the image. If the output of a layer is needed for pixels -r to n - 1 + r, then of its input

    * a k x k convolution needs r + (k - 1) / 2 more pixels on each side;
    * a norm over channels needs r;
    * a downsampling by a convolution of stride 2 (`Downsample`) reads for pixel p the pixels 2 p - 1 to 2 p + 1. For pixels -r to
      n - 1 + r these are -2 r - 1 to 2 n - 1 + 2 r, so 2 r + 1 more before the first and 2 r after the last pixel;
    * one that moves pixels to channels reads 2 p - 1 to 2 p + 2, so 2 r + 1 on each side.

    For the published encoder: for each of three stages the downsampling and four 3x3 convolutions, 1 -> 5, 11 -> 15, 31 -> 35, and
    1 (conv_in): 36 pixels, which are in 5 features.
    """
    reach = 0
    for layer in reversed([module for module in head.modules() if not list(module.children())]):
        reach = _REACH[type(layer)](layer, reach)
    return math.ceil(reach / scale)


def _encoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("encoder."): weights[name] for name in weights if name.startswith("encoder.")}


def _build_stage(encoder: EncoderConfig, weights: Mapping[str, Tensor], number: int, numerics: Numerics) -> nn.Sequential:
    """Stage `number` of the encoder: its blocks, then its downsampling. Stage 0 is the one at full resolution."""
    stage, name = encoder.stages[number], f"down_blocks.{number}."
    blocks = [BLOCKS[stage.block](stage, weights, f"{name}{index}.", numerics, 1) for index in range(stage.depth)]
    if stage.depth and number < len(encoder.stages) - 1:
        blocks.append(Downsample(encoder.downsample, weights, f"{name}{stage.depth}.conv", numerics, shortcut=True))
    return nn.Sequential(*blocks)


def _with_average(kernel: Tensor) -> Tensor:
    """The 3x3 kernel [C', C, 3, 3] that also adds the averages of groups of C / C' input channels."""
    kernel = kernel.float().clone()
    channels = torch.arange(kernel.shape[1])
    group = kernel.shape[1] // kernel.shape[0]
    kernel[channels // group, channels, 1, 1] += 1.0 / group
    return kernel


def _unshuffled(kernel: Tensor) -> Tensor:
    """The 4x4 kernel [4 C', C, 4, 4] of stride 2 that equals the 3x3 kernel [C', C, 3, 3] and then `pixel_unshuffle`."""
    out_channels, channels = kernel.shape[:2]
    wide = kernel.new_zeros(out_channels, 4, channels, 4, 4)
    for position in range(4):
        row, column = divmod(position, 2)
        wide[:, position, :, row : row + 3, column : column + 3] = kernel
    return wide.flatten(0, 1)


def _with_average_of_pixels(kernel: Tensor) -> Tensor:
    """The kernel of stride 2 that also adds the averages of groups of the 4 C values of 2x2 pixels, channel by channel."""
    kernel = kernel.clone()
    group = 4 * kernel.shape[1] // kernel.shape[0]
    for value in range(4 * kernel.shape[1]):
        channel, row, column = value // 4, value // 2 % 2, value % 2
        kernel[value // group, channel, 1 + row, 1 + column] += 1.0 / group
    return kernel


#: For each layer type of a head: how far beyond a feature its input is needed, if its output is needed `reach` pixels beyond it.
#: `encoder_halo` derives the formulas.
_REACH: dict[type[nn.Module], Callable[[Any, int], int]] = {
    Conv: lambda conv, reach: reach + conv.weight.shape[-1] // 2,
    ChannelNorm: lambda norm, reach: reach,
    Downsample: lambda downsample, reach: 2 * reach + 1,
    nn.Sequential: lambda nothing, reach: reach,
}
