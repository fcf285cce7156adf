"""Precision, stated once: what a graph computes in, and how half precision keeps to its range without changing the function.

Tensors that are known to pass 65504 in published checkpoints (residual streams, attention outputs, convolution outputs) are
stored multiplied by `Numerics.scale`, a power of two. The factor is moved into weights, biases, norm weights and norm epsilons,
so no operation is added and no bit of a normal number is lost. docs/numerics.md derives each place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sana_export.graphs.storage import keep

QK_NORM_EPS = 1e-5

#: Weight of a masked position before the softmax; exp(-10000) is exactly 0 in every precision.
MASKED = -10000.0

#: The largest finite float16. Self-attention outputs of the fp16 checkpoints were trained under a clip to it.
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Numerics:
    """What a graph computes in. `scale` multiplies the tensors that would leave the range of `dtype`."""

    dtype: torch.dtype
    scale: float = 1.0

    @property
    def narrow_range(self) -> bool:
        return self.scale != 1.0


#: float16 holds 1/64 of a value up to 4.19e6, and down to 0.004 without losing precision to subnormals.
NUMERICS = {
    "float32": Numerics(torch.float32),
    "bfloat16": Numerics(torch.bfloat16),
    "float16": Numerics(torch.float16, scale=2.0**-6),
}


def parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """`value` as a constant of the graph, kept where storage.py says."""
    return nn.Parameter(keep(value.detach().to(dtype).contiguous()), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b over the last axis, with W and b multiplied by `scale` before they are rounded to the graph's dtype.

    W is [out, in] as torch has it and stored as [in, out], which is how a product reads it: no transposition is left to a
    tracer or a runtime, which would hold a second copy of the weights for it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, numerics: Numerics, scale: float = 1.0) -> None:
        super().__init__()
        weight = weight if scale == 1.0 else weight.float() * scale
        self.weight = parameter(weight.to(numerics.dtype).T, numerics.dtype)
        self.bias = None if bias is None else parameter(bias.float() * scale, numerics.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Conv(nn.Module):
    """A stride-1 2D convolution that keeps the size, [B, C, H, W] -> [B, C', H, W]; the bias is multiplied by `bias_scale`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, numerics: Numerics, *, groups: int = 1, bias_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = parameter(weight, numerics.dtype)
        self.bias = None if bias is None else parameter(bias.float() * bias_scale, numerics.dtype)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        padding = self.weight.shape[-1] // 2
        return nn.functional.conv2d(x, self.weight, self.bias, padding=padding, groups=self.groups)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float | Tensor, *, axis: int = -1, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x / rms(x) * weight + bias over `axis`, computed in float32 and returned in x's dtype (arXiv 1910.07467).

    x is stored multiplied by `scale`: then `weight` has to hold the norm's weight divided by `scale`. The mean square is put right
    rather than epsilon, because the ONNX optimiser drops the addition of a constant below 1e-8.
    """
    wide = x.float()
    if axis == 1 and x.dtype == torch.float32:
        # float32 graphs are what CPUs run: there a product with a row of 1/C reads memory four times as fast as a reduction over
        # an outer axis. On a GPU, in half precision, a reduction fuses with its neighbours.
        share = torch.full((1, x.shape[1]), 1.0 / x.shape[1], device=x.device)
        square = (share @ wide.square().flatten(2)).unflatten(-1, x.shape[2:])
    else:
        square = wide.square().mean(axis, keepdim=True)
    if scale != 1.0:
        square = square * scale**-2
    normal = wide * torch.rsqrt(square + eps) * weight
    if bias is not None:
        normal = normal + bias
    return normal.to(x.dtype)


def silu(x: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` * SiLU(x / `scale`): SiLU of a tensor that is stored multiplied by `scale`."""
    if scale == 1.0:
        return x * torch.sigmoid(x)
    return x * torch.sigmoid(x.float() * (1.0 / scale)).to(x.dtype)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, numerics: Numerics) -> Tensor:
    """ReLU linear attention: out_i = (sum_j v_j (k_j . q_i)) / (sum_j k_j . q_i), 0 where that is 0 / 0; k and q after ReLU.

    All are [..., dim, tokens], channels first; so is the result. Source: diffusers `SanaLinearAttnProcessor2_0` and
    `SanaMultiscaleLinearAttention`, which add 1e-15 to the denominator; here it is its floor (`rms_norm` says why).
    """
    query, key = query.relu(), key.relu()
    if numerics.narrow_range:
        return _normalised_linear_attention(query, key, value)
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    numerator = (value @ key.transpose(-1, -2)) @ query
    denominator = key.sum(-1, keepdim=True).transpose(-1, -2) @ query
    return (numerator / denominator.clamp_min(1e-15)).to(dtype)


def _normalised_linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same, with both matrix products in half precision.

    With S_d = sum_j k_jd the result is sum_d (sum_j v_j k_jd / S_d) * (q_id S_d / sum_e q_ie S_e): an average of averages of v,
    so nothing leaves v's range however many tokens there are. `spread` moves a power of two from v to k, which keeps k / S
    (about one over the number of tokens) out of the subnormals.
    """
    spread = 64.0
    dtype = value.dtype
    total = key.float().sum(-1, keepdim=True)
    weights = query.float() * total
    weights = (weights / weights.sum(-2, keepdim=True).clamp_min(1e-15)).to(dtype)
    shares = (key.float() * (spread / total.clamp_min(1e-30))).to(dtype)
    averages = (value * (1.0 / spread)) @ shares.transpose(-1, -2)
    return averages @ weights
