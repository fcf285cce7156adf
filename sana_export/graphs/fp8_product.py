"""Products of inputs and weights in FP8 by the GPU's own matrix units.

The result is that of rounding, widening and multiplying, but for the order and precision of the sums. On an H100 the product of
2048 x 2240 and 2240 x 6720 numbers took 65 us, and 96 us in FP16. PyTorch's INT8 product took 97 us, so INT8 is widened to FP16.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sana_export.graphs.products import to_fp8

#: For fewer rows of inputs than this, FP16 is used.
LEAST_ROWS = 32
#: It also wants the numbers of input and of output channels to be multiples of this.
_MULTIPLE = 16
#: The largest relative error of its result in the norm, when `has_kernel` tries it: a rounding to 16 bits.
_TOLERANCE = 5e-3


def fp8_steps(x: Tensor, input_scale: Tensor) -> Tensor:
    """`x` in steps of `input_scale`, in FP8."""
    return to_fp8(x.float() / input_scale)


def fp8_product(x: Tensor, numbers: Tensor, input_scale: Tensor, scales: Tensor, axis: int = -1) -> Tensor:
    """The product over the channels of `x`, which are on `axis`, after rounding them in steps of `input_scale` (float32, []).

    The weight is FP8 `numbers` [in, out] times `scales` [out]; the inputs of an output channel are next to each other in memory.
    """
    last = x.movedim(axis, -1)
    steps = fp8_steps(last.reshape(-1, last.shape[-1]), input_scale)
    if not steps.is_contiguous():
        steps = steps.clone(memory_format=torch.contiguous_format)
    rows = input_scale.reshape(1, 1).repeat(len(steps), 1)
    y = torch._scaled_mm(steps, numbers, rows, scales.float().reshape(1, -1), out_dtype=x.dtype)
    return y.reshape(*last.shape[:-1], -1).movedim(-1, axis)


def has_kernel(inputs: str, weights: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `fp8_product` computes a layer whose inputs and weights [in, out] have these types."""
    fits = inputs == weights == "fp8" and len(shape) == 2 and all(size % _MULTIPLE == 0 for size in shape)
    return fits and device.type == "cuda" and _is_right(dtype, device)


@cache
def _is_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the product runs on the device and is right. PyTorch does not say which GPUs and versions have it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LEAST_ROWS, 64, generator=generator).to(device, dtype)
    numbers = (8 * torch.randn(48, 64, generator=generator)).to(device, torch.float8_e4m3fn).T
    scales = (torch.rand(48, generator=generator) + 0.5).to(device, dtype)
    input_scale = torch.tensor(1.0 / 16, device=device)
    try:
        found = fp8_product(x, numbers, input_scale, scales).float()
    except torch.OutOfMemoryError:  # says nothing about the kernel
        raise
    except (RuntimeError, ValueError):
        return False
    wanted = (fp8_steps(x, input_scale).float() * input_scale) @ (numbers.float() * scales.float())
    return bool((found - wanted).norm() <= _TOLERANCE * wanted.norm())
