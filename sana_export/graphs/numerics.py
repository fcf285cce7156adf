"""The precision that a graph computes in, and how half precision stays in range without changing the function.

In published checkpoints some tensors exceed 65504: residual streams, attention outputs and convolution outputs. They are stored
multiplied by `Numerics.scale`, a power of two. The factor is folded into weights, biases, norm weights and norm epsilons, so it
adds no operation and normal numbers lose no bit. docs/numerics.md derives each case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sana_export.graphs.storage import keep

QK_NORM_EPS = 1e-5

#: Added to the logit of a masked position. exp(-10000) is exactly 0 in every precision.
MASKED = -10000.0

#: The largest finite float16. The fp16 checkpoints were trained with self-attention outputs clipped to it.
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Numerics:
    """The precision of a graph."""

    #: The dtype that the graph computes in.
    dtype: torch.dtype
    #: Tensors that would leave the range of `dtype` are stored multiplied by this.
    scale: float = 1.0

    @property
    def narrow_range(self) -> bool:
        """Whether the dtype's range is too small for Sana's largest tensors."""
        return self.scale != 1.0


#: At a scale of 1/64, float16 stores values up to 4.19e6, and down to 0.004 without losing precision to subnormals.
NUMERICS = {
    "float32": Numerics(torch.float32),
    "bfloat16": Numerics(torch.bfloat16),
    "float16": Numerics(torch.float16, scale=2.0**-6),
}


def parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """`value` as a constant of the graph, in the storage that `stored_in` selects (storage.py)."""
    return nn.Parameter(keep(value.detach().to(dtype).contiguous()), requires_grad=False)


class Linear(nn.Module):
    """y = x W^T + b over the last axis. W and b are multiplied by `scale` before they are rounded to the graph's dtype.

    `weight` is [out, in], as in torch, but is stored as [in, out], the layout that the product reads. A tracer or runtime would
    make a second copy of the weights to transpose them.
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
    """A stride-1 2D convolution that keeps the size, [B, C, H, W] -> [B, C', H, W]. The bias is multiplied by `bias_scale`."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, numerics: Numerics, *, groups: int = 1, bias_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.weight = parameter(weight, numerics.dtype)
        self.bias = None if bias is None else parameter(bias.float() * bias_scale, numerics.dtype)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, lambda rows: rows)

    def part(self, x: Tensor, select: Callable[[Tensor], Tensor]) -> Tensor:
        """The output channels whose rows `select` takes of weight and bias: whole groups. `x` has only the channels of those."""
        weight, bias = select(self.weight), None if self.bias is None else select(self.bias)
        groups = self.groups * weight.shape[0] // self.weight.shape[0]
        return nn.functional.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float | Tensor, *, axis: int = -1, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x / rms(x) * weight + bias over `axis`, computed in float32 and returned in x's dtype (arXiv 1910.07467).

    If x is stored multiplied by `scale`, `weight` must be the norm's weight divided by `scale`. The mean square is corrected for
    the scale, not epsilon, because the ONNX optimizer drops the addition of a constant below 1e-8.
    """
    wide = x.float()
    if axis == 1 and x.dtype == torch.float32:
        # float32 graphs run on CPUs, which read memory four times as fast in a product with a row of 1/C as in a reduction over
        # an outer axis. On a GPU, in half precision, the reduction fuses with its neighbors.
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
    """`scale` * SiLU(x / `scale`), the SiLU of a tensor that is stored multiplied by `scale`."""
    if scale == 1.0:
        return x * torch.sigmoid(x)
    return x * torch.sigmoid(x.float() * (1.0 / scale)).to(x.dtype)


@dataclass(frozen=True)
class AttentionSums:
    """What linear attention keeps of keys and values: a matrix for each head, whatever the number of tokens."""

    #: sum_j v_j k_j [..., dim, dim]; with a narrow range the averages sum_j v_j k_jd / S_d, transposed and in half precision.
    products: Tensor
    #: S_d = sum_j k_jd, float32 [..., dim, 1].
    total: Tensor


def linear_attention(query: Tensor, key: Tensor, value: Tensor, numerics: Numerics) -> Tensor:
    """ReLU linear attention: out_i = (sum_j v_j (k_j . q_i)) / (sum_j k_j . q_i), or 0 for 0 / 0, with k and q after ReLU.

    All tensors, including the result, are [..., dim, tokens]. Source: diffusers `SanaLinearAttnProcessor2_0` and
    `SanaMultiscaleLinearAttention`. They add 1e-15 to the denominator; this clamps it to at least 1e-15 (see `rms_norm`).
    """
    return attend(query, attention_sums(key, value, numerics), numerics)


def attention_sums(key: Tensor, value: Tensor, numerics: Numerics) -> AttentionSums:
    """The sums over the tokens of `key` and `value`, [..., dim, tokens]."""
    key = key.relu()
    if numerics.narrow_range:
        return _normalized_sums(key, value)
    key, value = key.float(), value.float()
    return AttentionSums(value @ key.transpose(-1, -2), key.sum(-1, keepdim=True))


def joined_sums(parts: Sequence[AttentionSums], numerics: Numerics) -> AttentionSums:
    """The sums over the tokens of all `parts`."""
    total = torch.stack([part.total for part in parts]).sum(0)
    if not numerics.narrow_range:
        return AttentionSums(torch.stack([part.products for part in parts]).sum(0), total)
    # The average of all tokens is the average of the parts' averages, weighted by their totals.
    shares = [part.products.float() * (part.total / total.clamp_min(1e-30)) for part in parts]
    return AttentionSums(torch.stack(shares).sum(0).to(numerics.dtype), total)


def attend(query: Tensor, sums: AttentionSums, numerics: Numerics) -> Tensor:
    """`linear_attention` of `query` [..., dim, tokens] to the tokens of `sums`."""
    query = query.relu()
    if numerics.narrow_range:
        return _normalized_attend(query, sums)
    dtype, query = query.dtype, query.float()
    numerator = sums.products @ query
    denominator = sums.total.transpose(-1, -2) @ query
    return (numerator / denominator.clamp_min(1e-15)).to(dtype)


def _normalized_sums(key: Tensor, value: Tensor) -> AttentionSums:
    """The sums for `_normalized_attend`. `spread` moves a power of two from v to k, which keeps k / S (about one over the number of
    tokens) out of the subnormals."""
    spread = 64.0
    dtype = value.dtype
    total = key.float().sum(-1, keepdim=True)
    shares = (key.float() * (spread / total.clamp_min(1e-30))).to(dtype)
    # v is transposed, not k: what makes k's shares then is one kernel, which stores nothing in float32 (docs/step.md).
    return AttentionSums(shares @ (value * (1.0 / spread)).transpose(-1, -2), total)


def _normalized_attend(query: Tensor, sums: AttentionSums) -> Tensor:
    """`linear_attention` with both matrix products in half precision.

    With S_d = sum_j k_jd the result is sum_d (sum_j v_j k_jd / S_d) * (q_id S_d / sum_e q_ie S_e). This is an average of averages
    of v, so no value leaves v's range, for any number of tokens.
    """
    weights = query.float() * sums.total
    weights = (weights / weights.sum(-2, keepdim=True).clamp_min(1e-15)).to(query.dtype)
    return sums.products.transpose(-1, -2) @ weights
