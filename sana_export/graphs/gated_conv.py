"""The two halves of a gated convolution (diffusers `GLUMBConv`), each as an inverted bottleneck of its own.

diffusers computes both halves with one wide convolution and one depthwise convolution, then splits the result. The halves do not
interact until they are multiplied, so each one can be computed from its own rows of the weights. This avoids splitting the widest
tensors of the network, which would be a copy (benchmarks/notes.md has the cost).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sana_export.graphs.numerics import Conv, Numerics, silu


class GatedConvHalf(nn.Module):
    """1x1 convolution, SiLU, depthwise 3x3: [B, C, H, W] -> [B, hidden, H, W], from the weights' `rows`.

    The input is stored multiplied by `scale`, the output multiplied by `scale * factor`.
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
    """The halves "value" and "gate" of the block whose weights start with `name`. `factor` applies to the value only."""
    hidden = weights[f"{name}conv_point.weight"].shape[1]
    return nn.ModuleDict(
        {
            "value": GatedConvHalf(weights, name, slice(hidden), numerics, scale=scale, factor=factor),
            "gate": GatedConvHalf(weights, name, slice(hidden, 2 * hidden), numerics, scale=scale),
        }
    )
