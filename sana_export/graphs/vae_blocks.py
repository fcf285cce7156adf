"""The blocks of the DC-AE decoder and encoder, rewritten for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, pixel_shuffle

from sana_export.checkpoint.vae_config import VaeStage
from sana_export.graphs.gated_conv import gated_conv_halves
from sana_export.graphs.numerics import (
    AttentionSums,
    Conv,
    Numerics,
    attend,
    attention_sums,
    joined_sums,
    linear_attention,
    parameter,
    rms_norm,
    silu,
)
from sana_export.graphs.patches import Patch, in_patches, patches_of

NORM_EPS = 1e-5
#: For each output parity, which of the kernel's three taps read the first and which the second low-resolution pixel.
_TAPS = (([0], [1, 2]), ([0, 1], [2]))


class Upsample(nn.Module):
    """Doubles the size, [B, C, H, W] -> [B, C', 2 H, 2 W], with one convolution at the low resolution.

    diffusers doubles the pixels, runs a 3x3 convolution at the high resolution and adds a shortcut that moves channels to pixels
    (`DCUpBlock2d` with `interpolate`). On doubled pixels the nine taps read only 2x2 distinct pixels. So each of the four output
    parities is a 2x2 convolution whose taps are sums of the original ones: 4/9 of the work. The shortcut adds 1 to the tap of the
    pixel itself. The tensors are stored multiplied by `scale`.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, numerics: Numerics, *, shortcut: bool, scale: float) -> None:
        super().__init__()
        kernel = weights[f"{name}.weight"].float()
        out_channels, channels = kernel.shape[:2]
        # One kernel per parity [C', 2, 2, C, 2, 2]: output channel, row parity, column parity, input channel, tap, tap.
        folded = torch.stack([torch.stack([_fold(kernel, row, column) for column in (0, 1)], dim=1) for row in (0, 1)], dim=1)
        for position in range(4 * out_channels if shortcut else 0):
            out, row, column = position // 4, position // 2 % 2, position % 2
            folded[out, row, column, position * channels // (4 * out_channels), 1 - row, 1 - column] += 1.0
        # The flip makes `pixel_shuffle` put odd rows and columns first; forward explains why.
        folded = folded.flip(1, 2).reshape(4 * out_channels, channels, 2, 2)
        self.weight = parameter(folded, numerics.dtype)
        self.bias = parameter((weights[f"{name}.bias"].float() * scale).repeat_interleave(4), numerics.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # With one pixel of padding, window (i, j) ends at pixel (i, j). The even output row 2 i reads pixels i - 1 and i, which is
        # window i. The odd row 2 i + 1 reads pixels i and i + 1, window i + 1. With odd parities first, rows are in order from -1.
        windows = conv2d(x, self.weight, self.bias, padding=1)
        # A padding of -1 removes the border in one copy. Two slices would be two copies.
        return pad(pixel_shuffle(windows, 2), (-1, -1, -1, -1))


class PixelShuffle(nn.Module):
    """Four channels to 2x2 pixels, [B, 4 C, H, W] -> [B, C, 2 H, 2 W]."""

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(x, 2)


def upsampling(
    kind: str, weights: Mapping[str, Tensor], name: str, numerics: Numerics, *, shortcut: bool = True, scale: float
) -> nn.Module:
    """Doubles the size, [B, C, H, W] -> [B, C', 2 H, 2 W], as diffusers' `DCUpBlock2d` of `kind` with the convolution `name`.

    The tensors are stored multiplied by `scale`. The shortcut of "pixel_shuffle" moves channels to the same pixels as the shuffle
    after the convolution, so it is part of the convolution.
    """
    if kind == "interpolate":
        return Upsample(weights, name, numerics, shortcut=shortcut, scale=scale)
    kernel = weights[f"{name}.weight"]
    conv = Conv(with_shortcut(kernel) if shortcut else kernel, weights[f"{name}.bias"], numerics, bias_scale=scale)
    return nn.Sequential(conv, PixelShuffle())


def with_shortcut(kernel: Tensor) -> Tensor:
    """The 3x3 kernel [C', C, 3, 3] that also adds the input, with each channel repeated, to the convolution's output."""
    kernel = kernel.float().clone()
    out = torch.arange(kernel.shape[0])
    kernel[out, out * kernel.shape[1] // kernel.shape[0], 1, 1] += 1.0
    return kernel


def _fold(kernel: Tensor, row: int, column: int) -> Tensor:
    """The 2x2 kernel [C', C, 2, 2] that equals the 3x3 `kernel` on doubled pixels, for one output parity."""
    rows = torch.stack([kernel[:, :, taps].sum(2) for taps in _TAPS[row]], dim=2)
    return torch.stack([rows[..., taps].sum(-1) for taps in _TAPS[column]], dim=-1)


class ResBlock(nn.Module):
    """Two convolutions and a norm, with a residual. It ignores `bands`."""

    def __init__(self, stage: VaeStage, weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.scale, self.activation = numerics.scale, ACTIVATIONS[stage.activation]
        gain, self.norm = _norm(stage.norm, weights, f"{name}norm", numerics)
        self.conv1 = _conv(weights, f"{name}conv1", numerics)
        self.conv2 = Conv(gain(weights[f"{name}conv2.weight"]), None, numerics)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.activation(self.conv1(x), self.scale)))


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention, then a gated convolution, each with a residual. Both run in `bands` x `bands` patches."""

    def __init__(self, stage: VaeStage, weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.attention = MultiscaleAttention(stage, weights, f"{name}attn.", numerics, bands)
        self.feed_forward = GatedConv(weights, f"{name}conv_out.", numerics, bands)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.feed_forward(self.attention(x))
        return out


class Aggregation(nn.Module):
    """q, k and v of each pixel's neighborhood, [B, 3 C, H, W] -> the same: a depthwise convolution, then one over `dim` channels.

    So q, k and v do not mix.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, numerics: Numerics, dim: int) -> None:
        super().__init__()
        channels = weights[f"{name}proj_in.weight"].shape[0]
        self.depthwise = _conv(weights, f"{name}proj_in", numerics, groups=channels)
        self.pointwise = _conv(weights, f"{name}proj_out", numerics, groups=channels // dim)
        self.reach = self.depthwise.weight.shape[-1] // 2

    def forward(self, x: Tensor, select: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor:
        """`select`: see `Conv.part`."""
        return self.pointwise.part(self.depthwise.part(x, select), select)


class MultiscaleAttention(nn.Module):
    """x + the ReLU linear attention over the pixels of x [B, C, H, W], on q, k, v and on depthwise aggregations of them.

    For images of at most `head_dim` pixels diffusers computes the products in another order. The results differ only by rounding.

    Of k and v, linear attention needs only sums over pixels. So to save memory the block runs in patches (patches.py): first it
    adds up the sums of all patches, then it applies them to each patch's q. An aggregation also reads the pixels around the patch.
    A patch has at least as many rows as that, so there may be fewer bands than `bands`.
    """

    def __init__(self, stage: VaeStage, weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.numerics, self.dim = numerics, stage.head_dim
        self.qkv = parameter(torch.cat([weights[f"{name}to_{kind}.weight"] for kind in "qkv"]), numerics.dtype)
        count = sum(key.startswith(f"{name}to_qkv_multiscale.") for key in weights) // 2
        aggregations = [Aggregation(weights, f"{name}to_qkv_multiscale.{index}.", numerics, self.dim) for index in range(count)]
        self.aggregations = nn.ModuleList(aggregations)
        self.halo = max((aggregation.reach for aggregation in aggregations), default=0)
        # `bands` is at most the number of rows for each row of latents, and an image may have a single row of those.
        self.bands = max(bands // max(self.halo, 1), 1)
        gain, self.norm = _norm(stage.norm, weights, f"{name}norm_out", numerics)
        self.out = parameter(gain(weights[f"{name}to_out.weight"]), numerics.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.in_patches(x) if self.bands > 1 else x + self.whole(x)

    def whole(self, x: Tensor) -> Tensor:
        qkv = (self.qkv @ x.flatten(2)).unflatten(-1, x.shape[2:])
        # Heads are independent, so each scale is finished before the next one is computed.
        scales = [self.attend(qkv), *(self.attend(aggregate(qkv)) for aggregate in self.aggregations)]
        return self.finish(scales, x.shape[2:])

    def attend(self, qkv: Tensor) -> Tensor:
        """[B, 3 C, H, W] -> [B, C, H W]. The channels of each head are its q, k and v."""
        query, key, value = qkv.flatten(2).unflatten(1, (-1, 3, self.dim)).unbind(2)
        return linear_attention(query, key, value, self.numerics).flatten(1, 2)

    def finish(self, scales: list[Tensor], size: Sequence[int]) -> Tensor:
        """[B, C, H W] for each scale -> [B, C, H, W]."""
        return self.norm((self.out @ torch.cat(scales, dim=1)).unflatten(-1, size))

    def in_patches(self, x: Tensor) -> Tensor:
        parts = [self.sums(self.scales_of(patch, slice(1, 3))) for patch in patches_of(x, self.bands, self.halo)]
        sums = [joined_sums(scale, self.numerics) for scale in zip(*parts, strict=True)]

        def compute(patch: Patch) -> Tensor:
            queries = [query.flatten(2).unflatten(1, (-1, self.dim)) for query in self.scales_of(patch, slice(1))]
            attended = [attend(query, part, self.numerics).flatten(1, 2) for query, part in zip(queries, sums, strict=True)]
            own = patch.own(patch.read)
            return own + self.finish(attended, own.shape[2:])

        return in_patches(x, self.bands, self.halo, compute)

    def sums(self, scales: list[Tensor]) -> list[AttentionSums]:
        """The sums of k and v [B, 2 C, h, w], for each scale."""
        pairs = (scale.flatten(2).unflatten(1, (-1, 2, self.dim)).unbind(2) for scale in scales)
        return [attention_sums(key, value, self.numerics) for key, value in pairs]

    def scales_of(self, patch: Patch, kinds: slice) -> list[Tensor]:
        """`kinds` of q, k and v (0, 1, 2) of a patch at every scale, each [B, kinds C, h, w]."""
        values = (self.kinds(self.qkv, kinds) @ patch.read.flatten(2)).unflatten(-1, patch.read.shape[2:])
        select = partial(self.kinds, kinds=kinds)
        return [patch.own(values), *(patch.own(aggregation(values, select)) for aggregation in self.aggregations)]

    def kinds(self, weight: Tensor, kinds: slice) -> Tensor:
        """The rows of `weight` [3 C, ...] that belong to `kinds` of q, k and v."""
        return weight.unflatten(0, (-1, 3, self.dim))[:, kinds].flatten(0, 2)


class GatedConv(nn.Module):
    """x + an inverted bottleneck with a gate and a norm over channels (diffusers `GLUMBConv`) of x [B, C, H, W].

    Each half is four times as wide as the input, so to save memory the block runs in patches (patches.py). For the depthwise 3x3 a
    patch also reads the pixels next to it and drops the outputs there. The result is the same for any number of patches.
    """

    def __init__(self, weights: Mapping[str, Tensor], name: str, numerics: Numerics, bands: int) -> None:
        super().__init__()
        self.numerics, self.bands = numerics, bands
        self.halves = gated_conv_halves(weights, name, numerics, scale=numerics.scale)
        self.point = Conv(weights[f"{name}conv_point.weight"], None, numerics)
        self.norm = ChannelNorm(weights, f"{name}norm", numerics, scaled_input=False)

    def forward(self, x: Tensor) -> Tensor:
        return in_patches(x, self.bands, 1, lambda patch: patch.own(patch.read) + patch.own(self.branch(patch.read)))

    def branch(self, x: Tensor) -> Tensor:
        scale = self.numerics.scale
        y, gate = self.halves["value"](x), self.halves["gate"](x)
        if not self.numerics.narrow_range:
            return self.norm(self.point(y * silu(gate)))
        # A product of two large tensors has no safe constant scale. The norm removes each pixel's scale, so divide the pixel by its
        # largest magnitude and correct the norm's epsilon (the product carries the square of the scale).
        product = y.float() * silu(gate, scale).float()
        largest = product.abs().amax(1, keepdim=True).clamp_min(1e-12)
        out = self.point((product / largest).to(self.numerics.dtype))
        return self.norm(out, eps=NORM_EPS * scale**4 / largest.square())


class ChannelNorm(nn.Module):
    """RMSNorm over channels of [B, C, H, W] with weight and bias. Input and output may be stored multiplied by the scale."""

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


class ChannelBias(nn.Module):
    """Adds a number to each channel of [B, C, H, W], which is stored multiplied by the scale."""

    def __init__(self, bias: Tensor, numerics: Numerics) -> None:
        super().__init__()
        self.bias = parameter(bias.reshape(-1, 1, 1) * numerics.scale, numerics.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


def _norm(
    kind: str, weights: Mapping[str, Tensor], name: str, numerics: Numerics
) -> tuple[Callable[[Tensor], Tensor], ChannelNorm | ChannelBias]:
    """The norm `name` after a linear layer: a change to the layer's weight, and what is left to do after the layer.

    A batch norm is a constant factor and offset for each channel, so its factor moves into the weight.
    """
    if kind == "rms_norm":
        return (lambda weight: weight), ChannelNorm(weights, name, numerics)
    mean, variance, factor, bias = (weights[f"{name}.{part}"].float() for part in ("running_mean", "running_var", "weight", "bias"))
    gain = factor * torch.rsqrt(variance + NORM_EPS)
    return (lambda weight: weight.float() * gain.reshape(-1, *[1] * (weight.dim() - 1))), ChannelBias(bias - mean * gain, numerics)


def _conv(weights: Mapping[str, Tensor], name: str, numerics: Numerics, *, groups: int = 1) -> Conv:
    """The convolution `name` for a tensor that is stored multiplied by the scale. Only the bias has to be scaled."""
    return Conv(weights[f"{name}.weight"], weights.get(f"{name}.bias"), numerics, groups=groups, bias_scale=numerics.scale)


#: The block classes, by their names in a VAE's config.
BLOCKS: dict[str, type[nn.Module]] = {"ResBlock": ResBlock, "EfficientViTBlock": EfficientViTBlock}
#: The activations, by their names in a VAE's config: functions of a tensor and of the scale that it is stored multiplied by.
ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {"silu": silu, "swish": silu, "relu": lambda x, scale: x.relu()}
