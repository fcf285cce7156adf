"""The DC-AE decoder (arXiv 2410.10733): latents to image.

Source of the function: diffusers `AutoencoderDC` with ResBlock and EfficientViTBlock stages. Every stream, convolution and
attention output is stored multiplied by `numerics.scale`; the RMSNorms that read them divide it out through their epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana_export.errors import ArtifactError
from sana_export.graphs.numerics import Conv, Numerics
from sana_export.graphs.vae_blocks import BLOCKS, ChannelNorm, Upsample

#: Bands of rows that a gated convolution of the head is computed in, where its stage has that many rows a row of latents.
MOST_BANDS = 4


class VaeDecoder(nn.Module):
    """latents float32 [B, C, h, w], as the sampler leaves them, to image float32 [B, 3, 32 h, 32 w], about [-1, 1]."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        self.head = VaeDecoderHead(config, weights, numerics, bands=1)
        self.tail = VaeDecoderTail(config, weights, numerics)

    def forward(self, latents: Tensor) -> Tensor:
        return self.tail.image(self.head(latents))


class VaeDecoderHead(nn.Module):
    """The stages up to the last one with global attention: latents float32 [B, C, h, w] to features [B, C', f h, f w].

    Features are in the graph's precision and stored multiplied by its scale. Published: C' = 512, f = 4 (1/8 of the image).
    `bands`: see `GatedConv`; they only save memory, which a decoder of images that fit in one piece has.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics, *, bands: int = MOST_BANDS
    ) -> None:
        super().__init__()
        check_config(config)
        weights = _decoder_weights(weights)
        self.dtype, self.factor = numerics.dtype, numerics.scale / config["scaling_factor"]
        self.conv_in = Conv(_with_shortcut(weights["conv_in.weight"]), weights["conv_in.bias"], numerics, bias_scale=numerics.scale)
        stages = range(local_stages(config), len(config["decoder_block_out_channels"]))
        self.stages = nn.Sequential(*(build_stage(config, weights, stage, numerics, bands) for stage in reversed(stages)))

    def forward(self, latents: Tensor) -> Tensor:
        features: Tensor = self.stages(self.conv_in((latents * self.factor).to(self.dtype)))
        return features


class VaeDecoderTail(nn.Module):
    """The stages of convolutions and norms of single pixels: a window of the head's features to its part of the image.

    features [B, C', H, W]; row_index int64 [n] and column_index int64 [m] are the window's rows and columns of them. Returns
    float32 [B, 3, s n, s m] (published: s = 8): the untiled image, except within `tile_halo` features of a side of the window that
    is no side of the features. There the convolutions' zero padding stands for pixels that the window lacks.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        check_config(config)
        weights = _decoder_weights(weights)
        stages = range(local_stages(config))
        self.stages = nn.Sequential(*(build_stage(config, weights, stage, numerics) for stage in reversed(stages)))
        self.norm_out = ChannelNorm(weights, "norm_out", numerics, scaled_output=False)
        self.conv_out = Conv(weights["conv_out.weight"], weights["conv_out.bias"], numerics)

    def forward(self, features: Tensor, row_index: Tensor, column_index: Tensor) -> Tensor:
        return self.image(features.index_select(2, row_index).index_select(3, column_index))

    def image(self, features: Tensor) -> Tensor:
        """The image of all of `features`."""
        image: Tensor = self.conv_out(self.norm_out(self.stages(features)).relu()).float()
        return image


def local_stages(config: Mapping[str, Any]) -> int:
    """How many stages at the end of the decoder are without attention, so that a pixel of theirs reaches finitely far."""
    kinds = stage_kinds(config)
    return next((stage for stage, kind in enumerate(kinds) if kind != "ResBlock"), len(kinds))


def feature_channels(config: Mapping[str, Any]) -> int:
    """Channels of what the head hands to the tail."""
    channels = config["decoder_block_out_channels"]
    return int(channels[min(local_stages(config), len(channels) - 1)])


def tile_scale(config: Mapping[str, Any]) -> int:
    """Image pixels a feature of the head, in height and in width: every stage but the lowest doubles both."""
    return 2 ** min(local_stages(config), len(config["decoder_block_out_channels"]) - 1)


def tile_halo(tail: VaeDecoderTail) -> int:
    """How many features beyond its own an image pixel of `tail` depends on, to each side.

    Walks from the image back to the features. Where the n pixels that one feature covers at some resolution need r more to each
    side of a layer's output, -r to n - 1 + r, of its input

    * a k x k convolution needs r + (k - 1) / 2;
    * a norm over channels needs r;
    * an upsampling (`Upsample`) reads for pixel p the low-resolution pixels floor((p - 1) / 2) to floor((p + 1) / 2). Over pixels
      -r to 2 n - 1 + r that is floor((-r - 1) / 2) = -(floor(r / 2) + 1) to floor((2 n + r) / 2) = n - 1 + (floor(r / 2) + 1): on
      both sides floor(r / 2) + 1, counted at the low resolution.

    A residual reaches as far as its longer branch, the convolutions. Published decoder: 1 (conv_out), then for each of three stages
    six 3x3 convolutions and the upsampling: 7 -> 4, 10 -> 6, 12 -> 7 features, which is 56 image pixels.
    """
    reach = 0
    for layer in reversed([module for module in tail.modules() if not list(module.children())]):
        reach = _REACH[type(layer)](layer, reach)
    return reach


def stage_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of block of every stage, the one at full resolution first."""
    kinds = config["decoder_block_types"]
    return (kinds,) * len(config["decoder_block_out_channels"]) if isinstance(kinds, str) else tuple(kinds)


def _decoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("decoder."): weights[name] for name in weights if name.startswith("decoder.")}


def _with_shortcut(kernel: Tensor) -> Tensor:
    """A 3x3 kernel [C', C, 3, 3] that adds the input, its channels repeated in place, to the convolution."""
    kernel = kernel.float().clone()
    out = torch.arange(kernel.shape[0])
    kernel[out, out * kernel.shape[1] // kernel.shape[0], 1, 1] += 1.0
    return kernel


def build_stage(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], stage: int, numerics: Numerics, bands: int = 1
) -> nn.Sequential:
    """Stage `stage` of the decoder (0 is the one at full resolution): its upsampling, then its blocks."""
    blocks: list[nn.Module] = []
    channels = config["decoder_block_out_channels"]
    kind = stage_kinds(config)[stage]
    name = f"up_blocks.{stage}."
    if stage < len(channels) - 1:
        blocks.append(Upsample(weights, f"{name}0.conv", channels[stage + 1], channels[stage], numerics))
    bands = min(bands, 2 ** (len(channels) - 1 - stage))  # the stage has that many rows a row of latents
    for _ in range(config["decoder_layers_per_block"][stage]):
        blocks.append(BLOCKS[kind](config, weights, f"{name}{len(blocks)}.", numerics, bands))
    return nn.Sequential(*blocks)


#: The layers that a tail is made of: how far their input is needed for an output that is needed `reach` pixels far. `tile_halo`
#: derives it.
_REACH: dict[type[nn.Module], Callable[[Any, int], int]] = {
    Conv: lambda conv, reach: reach + conv.weight.shape[-1] // 2,
    ChannelNorm: lambda norm, reach: reach,
    Upsample: lambda upsample, reach: reach // 2 + 1,
    nn.Sequential: lambda nothing, reach: reach,
}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ArtifactError where the autoencoder's decoder is not one that this graph restates."""

    def every(key: str) -> set[str]:
        value = config[key]
        return {value} if isinstance(value, str) else set(value)

    found_and_wanted = {
        "decoder_block_types": (every("decoder_block_types") - set(BLOCKS), set()),
        "decoder_norm_types": (every("decoder_norm_types"), {"rms_norm"}),
        "decoder_act_fns": (every("decoder_act_fns"), {"silu"}),
        "upsample_block_type": (config["upsample_block_type"], "interpolate"),
        "decoder_in_shortcut": (config.get("decoder_in_shortcut", True), True),
        "decoder_conv_act_fn": (config.get("decoder_conv_act_fn", "relu"), "relu"),
        "decoder_layers_per_block": (min(config["decoder_layers_per_block"]) > 0, True),
    }
    for key, (found, wanted) in found_and_wanted.items():
        if found != wanted:
            raise ArtifactError(f"the VAE's config.json has an unsupported {key}", found=config.get(key), wanted=wanted)
