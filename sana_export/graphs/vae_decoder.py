"""The DC-AE decoder (arXiv 2410.10733): latents to image.

Source: diffusers `AutoencoderDC`, as far as checkpoint/vae_config.py supports it. Every stream, convolution and attention output is
stored multiplied by `numerics.scale`. The RMSNorms that read them divide it out (see numerics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sana_export.checkpoint.vae_config import DecoderConfig, read_decoder
from sana_export.graphs.numerics import Conv, Numerics
from sana_export.graphs.patches import in_bands
from sana_export.graphs.vae_blocks import (
    ACTIVATIONS,
    BLOCKS,
    ChannelBias,
    ChannelNorm,
    PixelShuffle,
    Upsample,
    upsampling,
    with_shortcut,
)

#: The largest number of bands of rows and of columns that the head computes a gated convolution in (patches.py). A stage with fewer
#: rows per latent row has fewer.
MAX_BANDS = 4
#: The number of bands of rows that a decoder of whole images in half precision computes its last blocks in. float32 graphs run on
#: CPUs, where a small image would take longer.
LAST_BANDS = 4


class VaeDecoder(nn.Module):
    """latents float32 [B, C, h, w] -> image float32 [B, 3, 32 h, 32 w], values about [-1, 1].

    The latents are the sampler's, before the division by the VAE's scaling factor.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        self.head = VaeDecoderHead(config, weights, numerics, bands=1)
        self.tail = VaeDecoderTail(config, weights, numerics)
        self.bands = 1 if numerics.dtype == torch.float32 else LAST_BANDS

    def forward(self, latents: Tensor) -> Tensor:
        return self.tail.image(self.head(latents), self.bands)


class VaeDecoderHead(nn.Module):
    """The stages up to the last one with global attention: latents float32 [B, C, h, w] -> features [B, C', f h, f w].

    Features are in the graph's precision and stored multiplied by its scale. In the published decoder C' = 512 and f = 4, which is
    1/8 of the image. In a decoder without attention (DC-AE-Lite) the head is the first convolution alone, and f = 1. `bands` save
    memory (patches.py). A decoder that decodes images in one piece has enough without them.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics, *, bands: int = MAX_BANDS
    ) -> None:
        super().__init__()
        decoder, weights = read_decoder(config), _decoder_weights(weights)
        self.dtype, self.factor = numerics.dtype, numerics.scale / decoder.scaling_factor
        kernel = weights["conv_in.weight"]
        kernel = with_shortcut(kernel) if decoder.in_shortcut else kernel
        self.conv_in = Conv(kernel, weights["conv_in.bias"], numerics, bias_scale=numerics.scale)
        stages = range(decoder.local_stages, len(decoder.stages))
        self.stages = nn.Sequential(*(build_stage(decoder, weights, stage, numerics, bands) for stage in reversed(stages)))

    def forward(self, latents: Tensor) -> Tensor:
        features: Tensor = self.stages(self.conv_in((latents * self.factor).to(self.dtype)))
        return features


class VaeDecoderTail(nn.Module):
    """The stages without attention: a window of the head's features -> that part of the image.

    features are [B, C', H, W]. row_index int64 [n] and column_index int64 [m] select the window's rows and columns. Returns float32
    [B, 3, s n, s m], with s = 8 in the published decoder and 32 in DC-AE-Lite. It equals the untiled image except within
    `tile_halo` features of a window border that is not a border of the features: there the convolutions read zero padding instead
    of the missing pixels.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], numerics: Numerics) -> None:
        super().__init__()
        decoder, weights = read_decoder(config), _decoder_weights(weights)
        stages = range(decoder.local_stages)
        self.stages = nn.Sequential(*(build_stage(decoder, weights, stage, numerics) for stage in reversed(stages)))
        self.stride = decoder.stride
        # From here on, nothing is multiplied by the scale.
        self.norm_out = ChannelNorm(weights, "norm_out", numerics, scaled_output=False)
        self.activation = ACTIVATIONS[decoder.out_activation]
        self.conv_out: nn.Module
        if decoder.stages[0].depth:
            self.conv_out = Conv(weights["conv_out.weight"], weights["conv_out.bias"], numerics)
        else:
            self.conv_out = upsampling(decoder.upsample, weights, "conv_out.conv", numerics, shortcut=False, scale=1.0)

    def forward(self, features: Tensor, row_index: Tensor, column_index: Tensor) -> Tensor:
        return self.image(features.index_select(2, row_index).index_select(3, column_index))

    def image(self, features: Tensor, bands: int = 1) -> Tensor:
        """The image of the whole of `features`. Its last stage with blocks runs in at most `bands` bands, one after the other.

        That stage has the widest tensors: without bands, three of them decide how much memory a decoder takes. With `bands` > 1,
        the image's height must be a multiple of `stride`: features are those of whole latents.
        """
        stages = list(self.stages)
        last = max((index for index, stage in enumerate(stages) if list(stage.children())), default=0)
        layers = [*(layer for stage in stages[last:] for layer in stage.modules()), *self.conv_out.modules()]
        factor, halo = 2 ** sum(isinstance(layer, Upsample | PixelShuffle) for layer in layers), reach(layers)
        x = _run(stages[:last], features)
        while bands > 1 and bands * halo > self.stride // factor:  # an image may have a single row of latents
            bands //= 2
        return in_bands(x, bands, halo, factor, lambda band: self.finish(_run(stages[last:], band)))

    def finish(self, x: Tensor) -> Tensor:
        """The output of the last stage -> the image."""
        image: Tensor = self.conv_out(self.activation(self.norm_out(x), 1.0)).float()
        return image


def _run(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def feature_channels(config: Mapping[str, Any]) -> int:
    """Channels of the features that go from the head to the tail."""
    decoder = read_decoder(config)
    return decoder.stages[min(decoder.local_stages, len(decoder.stages) - 1)].channels


def tile_scale(config: Mapping[str, Any]) -> int:
    """Image pixels per feature, in height and in width. Every stage except the lowest doubles both."""
    decoder = read_decoder(config)
    return int(2 ** min(decoder.local_stages, len(decoder.stages) - 1))


def tile_halo(tail: VaeDecoderTail) -> int:
    """The number of neighboring features, on each side of its own, that an image pixel of `tail` depends on.

    Walks from the image back to the features. At some resolution one feature covers n pixels, 0 to n - 1. If the image needs r more
    pixels of a layer's output on each side, -r to n - 1 + r, then of the layer's input

    * a k x k convolution needs r + (k - 1) / 2 more pixels on each side;
    * a norm over channels needs r;
    * moving channels to 2x2 pixels (`PixelShuffle`) needs ceil(r / 2) low-resolution pixels;
    * an upsampling by repetition (`Upsample`) reads for pixel p the low-resolution pixels floor((p - 1) / 2) to floor((p + 1) / 2).
      For pixels -r to 2 n - 1 + r these are floor((-r - 1) / 2) = -(floor(r / 2) + 1) to
      floor((2 n + r) / 2) = n - 1 + (floor(r / 2) + 1). So it needs floor(r / 2) + 1 low-resolution pixels on each side.

    A residual block reaches as far as its longer branch, the convolutions. For the published decoder: 1 (conv_out), then for each
    of three stages six 3x3 convolutions and the upsampling, 7 -> 4, 10 -> 6, 12 -> 7 features, which is 56 image pixels. For
    DC-AE-Lite, whose tail is everything after the first convolution: 1 (conv_out at half of the resolution), then 6, 10, 8 and 8
    convolutions, each with an upsampling, 7 -> 5, 15 -> 9, 17 -> 10, 18 -> 10, and 8 more: 18 features, which is 576 image pixels.
    """
    return reach(tail.modules())


def reach(modules: Iterable[nn.Module]) -> int:
    """How far beyond a pixel of its own `modules`, one after the other, read their input. See `tile_halo`."""
    pixels = 0
    for layer in reversed([module for module in modules if not list(module.children())]):
        pixels = _REACH[type(layer)](layer, pixels)
    return pixels


def _decoder_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("decoder."): weights[name] for name in weights if name.startswith("decoder.")}


def build_stage(
    decoder: DecoderConfig, weights: Mapping[str, Tensor], number: int, numerics: Numerics, bands: int = 1
) -> nn.Sequential:
    """Stage `number` of the decoder: its upsampling, then its blocks. Stage 0 is the one at full resolution."""
    blocks: list[nn.Module] = []
    stage, lowest, name = decoder.stages[number], len(decoder.stages) - 1, f"up_blocks.{number}."
    if stage.depth and number < lowest:
        blocks.append(upsampling(decoder.upsample, weights, f"{name}0.conv", numerics, scale=numerics.scale))
    bands = min(bands, 2 ** (lowest - number))  # the rows that the stage has per latent row
    for _ in range(stage.depth):
        blocks.append(BLOCKS[stage.block](stage, weights, f"{name}{len(blocks)}.", numerics, bands))
    return nn.Sequential(*blocks)


#: For each layer type of a tail: how far beyond a feature its input is needed, if its output is needed `reach` pixels beyond it.
#: `tile_halo` derives the formulas.
_REACH: dict[type[nn.Module], Callable[[Any, int], int]] = {
    Conv: lambda conv, reach: reach + conv.weight.shape[-1] // 2,
    ChannelNorm: lambda norm, reach: reach,
    ChannelBias: lambda bias, reach: reach,
    Upsample: lambda upsample, reach: reach // 2 + 1,
    PixelShuffle: lambda shuffle, reach: (reach + 1) // 2,
    nn.Sequential: lambda nothing, reach: reach,
}
