"""The DC-AE decoder (arXiv 2410.10733): latents to image.

Source of the function: diffusers `AutoencoderDC` with ResBlock and EfficientViTBlock stages. Every stream, convolution and
attention output is stored multiplied by `numerics.scale`; the RMSNorms that read them divide it out through their epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle

from sana_export.errors import ArtifactError
from sana_export.graphs.gated_conv import gated_conv_halves
from sana_export.graphs.numerics import Conv, Numerics, linear_attention, parameter, rms_norm, silu

NORM_EPS = 1e-5
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


class Upsample(nn.Module):
    """Twice the size, [B, C, H, W] -> [B, C', 2 H, 2 W], as one convolution at the low resolution.

    diffusers doubles the pixels, convolves 3x3 at the high resolution and adds a shortcut that moves channels to pixels
    (`DCUpBlock2d`). Of the nine taps on doubled pixels only 2x2 different pixels are read, so each of the four output parities
    is a 2x2 convolution with sums of taps: 4/9 of the work, and nothing is computed on repeated pixels. The shortcut is a 1 in
    the tap of the pixel itself.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, channels: int, out_channels: int, numerics: Numerics) -> None:
        super().__init__()
        kernel = weights[f"{name}.weight"].float()
        repeats = out_channels * 4 // channels
        # One kernel a parity [C', 2, 2, C, 2, 2]: (output channel, row parity, column parity, input channel, tap, tap).
        folded = torch.stack([torch.stack([_fold(kernel, row, column) for column in (0, 1)], dim=1) for row in (0, 1)], dim=1)
        for position in range(4 * out_channels):
            out, row, column = position // 4, position // 2 % 2, position % 2
            folded[out, row, column, position // repeats, 1 - row, 1 - column] += 1.0
        # `pixel_shuffle` then lays the odd rows and columns first, one pixel off the border: see forward.
        folded = folded.flip(1, 2).reshape(4 * out_channels, channels, 2, 2)
        self.weight = parameter(folded, numerics.dtype)
        self.bias = parameter((weights[f"{name}.bias"].float() * numerics.scale).repeat_interleave(4), numerics.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # With one pixel of padding, window (i, j) ends at pixel (i, j). An even output row 2i reads pixels i-1 and i (window i),
        # an odd one, 2i + 1, pixels i and i + 1 (window i + 1): with the odd parity first, rows come out in order from row -1.
        windows = conv2d(x, self.weight, self.bias, padding=1)
        # A padding of -1 takes the border off in one copy; two slices are two.
        return pad(pixel_shuffle(windows, 2), (-1, -1, -1, -1))


def _fold(kernel: Tensor, row: int, column: int) -> Tensor:
    """The 2x2 kernel [C', C, 2, 2] that a 3x3 `kernel` over doubled pixels is at one output parity."""
    rows = torch.stack([kernel[:, :, taps].sum(2) for taps in _TAPS[row]], dim=2)
    return torch.stack([rows[..., taps].sum(-1) for taps in _TAPS[column]], dim=-1)


#: Parity: the taps of three that fall on the first and on the second low-resolution pixel.
_TAPS = (([0], [1, 2]), ([0, 1], [2]))


class ResBlock(nn.Module):
    """Two convolutions, a norm over channels and the residual."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.scale = numerics.scale
        self.conv1 = _conv(weights, f"{name}conv1", numerics)
        self.conv2 = _conv(weights, f"{name}conv2", numerics)
        self.norm = ChannelNorm(weights, f"{name}norm", numerics)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(silu(self.conv1(x), self.scale)))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolution, each with its residual. `bands`: see `GatedConv`."""

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.attention = MultiscaleAttention(config, weights, f"{name}attn.", numerics)
        self.feed_forward = GatedConv(weights, f"{name}conv_out.", numerics, bands)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over pixels, on q, k, v and on depthwise-aggregated copies of them.

    diffusers turns to the same formula in another order of products at up to `attention_head_dim` pixels; this is that function
    too, up to rounding.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, Tensor], name: str, numerics: Numerics) -> None:
        super().__init__()
        self.numerics, self.dim = numerics, config["attention_head_dim"]
        self.qkv = parameter(torch.cat([weights[f"{name}to_{kind}.weight"] for kind in "qkv"]), numerics.dtype)
        inner = self.qkv.shape[0]
        count = sum(key.startswith(f"{name}to_qkv_multiscale.") for key in weights) // 2
        self.aggregations = nn.ModuleList(
            nn.Sequential(
                _conv(weights, f"{name}to_qkv_multiscale.{index}.proj_in", numerics, groups=inner),
                _conv(weights, f"{name}to_qkv_multiscale.{index}.proj_out", numerics, groups=inner // self.dim),
            )
            for index in range(count)
        )
        self.out = parameter(weights[f"{name}to_out.weight"], numerics.dtype)
        self.norm = ChannelNorm(weights, f"{name}norm_out", numerics)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        qkv = (self.qkv @ x.flatten(2)).unflatten(-1, size)
        # Heads are independent, so each scale is done with before the next one is made.
        scales = [self.attend(qkv), *(self.attend(aggregate(qkv)) for aggregate in self.aggregations)]
        return self.norm((self.out @ torch.cat(scales, dim=1)).unflatten(-1, size))

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, 3 C, H, W], q, k and v of a head side by side, to [B, C, H W]."""
        query, key, value = qkv.flatten(2).unflatten(1, (-1, 3, self.dim)).unbind(2)
        return linear_attention(query, key, value, self.numerics).flatten(1, 2)


class GatedConv(nn.Module):
    """Inverted bottleneck with a gate and a norm over channels (diffusers `GLUMBConv`).

    Inside, each half is four times as wide as outside, so it runs in `bands` bands of rows, which divide the height. A band
    reads one row more on each side that is no side of the image, for the depthwise 3x3, and what comes of these rows is dropped:
    nothing changes.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.numerics, self.bands = numerics, bands
        self.halves = gated_conv_halves(weights, name, numerics, scale=numerics.scale)
        self.point = Conv(weights[f"{name}conv_point.weight"], None, numerics)
        self.norm = ChannelNorm(weights, f"{name}norm", numerics, scaled_input=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, done = x.shape[2] // self.bands, []
        for band in range(self.bands):
            above, below = int(band > 0), int(band < self.bands - 1)
            read = x[:, :, band * rows - above : (band + 1) * rows + below]
            done.append(self.band(read)[:, :, above : above + rows])
        return torch.cat(done, dim=2)

    def band(self, x: Tensor) -> Tensor:
        scale = self.numerics.scale
        y, gate = self.halves["value"](x), self.halves["gate"](x)
        if not self.numerics.narrow_range:
            return self.norm(self.point(y * silu(gate)))
        # A product of two large tensors has no safe constant scale. The norm makes every pixel's scale free: divide by its
        # largest magnitude, and correct the norm's epsilon for it (the product carries scale squared).
        product = y.float() * silu(gate, scale).float()
        largest = product.abs().amax(1, keepdim=True).clamp_min(1e-12)
        out = self.point((product / largest).to(self.numerics.dtype))
        return self.norm(out, eps=NORM_EPS * scale**4 / largest.square())


class ChannelNorm(nn.Module):
    """RMSNorm over channels of [B, C, H, W] with weight and bias; input and output stored multiplied by the scale."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        name: str,
        numerics: Numerics,
        *,
        scaled_input: bool = True,
        scaled_output: bool = True,
    ) -> None:
        super().__init__()
        self.scale = numerics.scale if scaled_input else 1.0
        factor = numerics.scale if scaled_output else 1.0
        self.weight = parameter(weights[f"{name}.weight"].float().reshape(-1, 1, 1) * (factor / self.scale), torch.float32)
        self.bias = parameter(weights[f"{name}.bias"].float().reshape(-1, 1, 1) * factor, torch.float32)

    def forward(self, x: Tensor, eps: float | Tensor = NORM_EPS) -> Tensor:
        return rms_norm(x, self.weight, eps, axis=1, bias=self.bias, scale=self.scale)


BLOCKS: dict[str, type[nn.Module]] = {"ResBlock": ResBlock, "EfficientViTBlock": EfficientViTBlock}

#: The layers that a tail is made of: how far their input is needed for an output that is needed `reach` pixels far. `tile_halo`
#: derives it.
_REACH: dict[type[nn.Module], Callable[[Any, int], int]] = {
    Conv: lambda conv, reach: reach + conv.weight.shape[-1] // 2,
    ChannelNorm: lambda norm, reach: reach,
    Upsample: lambda upsample, reach: reach // 2 + 1,
    nn.Sequential: lambda nothing, reach: reach,
}


def _conv(weights: Mapping[str, Tensor], name: str, numerics: Numerics, *, groups: int = 1) -> Conv:
    """The convolution `name` over a tensor stored multiplied by the scale: only its bias has to follow."""
    return Conv(weights[f"{name}.weight"], weights.get(f"{name}.bias"), numerics, groups=groups, bias_scale=numerics.scale)


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
