"""The two halves of a gated convolution (diffusers `GLUMBConv`): each an inverted bottleneck of its own.

diffusers widens the input to both halves with one convolution, runs one depthwise convolution over them and cuts the result in two.
No channel of one half meets the other before they are multiplied, so each half is computed from its own rows of the weights, and
the widest tensors of the network are never cut, which is a copy (benchmarks/notes.md has what that takes).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sana_export.graphs.numerics import Conv, Numerics, silu


class GatedConvHalf(nn.Module):
    """1x1 convolution, SiLU, depthwise 3x3: [B, C, H, W] -> [B, hidden, H, W], one half of the block's channels.

    The input is stored multiplied by `scale`, the output by `scale` and `factor`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        name: str,
        rows: slice,
        numerics: Numerics,
        *,
        scale: float = 1.0,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.inverted = Conv(
            weights[f"{name}conv_inverted.weight"][rows], weights[f"{name}conv_inverted.bias"][rows], numerics, bias_scale=scale
        )
        depthwise = weights[f"{name}conv_depth.weight"][rows]
        self.depthwise = Conv(
            depthwise if factor == 1.0 else depthwise.float() * factor,
            weights[f"{name}conv_depth.bias"][rows],
            numerics,
            groups=depthwise.shape[0],
            bias_scale=scale * factor,
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.depthwise(silu(self.inverted(x), self.scale))
        return out


def gated_conv_halves(
    weights: Mapping[str, Tensor], name: str, numerics: Numerics, *, scale: float = 1.0, factor: float = 1.0
) -> nn.ModuleDict:
    """The value and the gate of `name`conv_*; only the value is multiplied by `factor`."""
    hidden = weights[f"{name}conv_point.weight"].shape[1]
    return nn.ModuleDict(
        {
            "value": GatedConvHalf(weights, name, slice(hidden), numerics, scale=scale, factor=factor),
            "gate": GatedConvHalf(weights, name, slice(hidden, 2 * hidden), numerics, scale=scale),
        }
    )
