"""Products of rounded inputs and quantized weights in INT8 or FP8, by the GPU's own matrix units.

The result is that of rounding, widening and multiplying, but for the order and precision of the sums: INT8 adds exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from sana_export.formats.quantized import FP8_MAX

#: The kernels refuse fewer rows of inputs.
LEAST_ROWS = 32
#: They also want the numbers of input and of output channels to be multiples of this.
_MULTIPLE = 16
#: The largest relative error of a kernel's result in the norm, when `choose_kernel` tries it: a rounding to 16 bits.
_TOLERANCE = 5e-3


def _int8(x: Tensor, numbers: Tensor, input_scale: Tensor, scales: Tensor) -> Tensor:
    steps = (x.float() / input_scale).round().clamp(-128, 127).to(torch.int8)
    return (torch._int_mm(steps, numbers).float() * (scales.float() * input_scale)).to(x.dtype)


def _fp8_steps(x: Tensor, input_scale: Tensor) -> Tensor:
    return (x.float() / input_scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _fp8_rows(x: Tensor, numbers: Tensor, input_scale: Tensor, scales: Tensor) -> Tensor:
    """With the kernel's own scale for each row and column."""
    rows = input_scale.reshape(1, 1).expand(x.shape[0], 1).contiguous()
    columns = scales.float().reshape(1, -1)
    return torch._scaled_mm(_fp8_steps(x, input_scale), numbers, rows, columns, out_dtype=x.dtype)


def _fp8_whole(x: Tensor, numbers: Tensor, input_scale: Tensor, scales: Tensor) -> Tensor:
    """With one scale in the kernel. The result is float32, because those of the columns come after it."""
    one = torch.ones_like(input_scale)
    wide = torch._scaled_mm(_fp8_steps(x, input_scale), numbers, input_scale, one, out_dtype=torch.float32)
    return (wide * scales.float()).to(x.dtype)


#: Name -> the product of x [rows, in], rounded in steps of `input_scale` (float32, []), and numbers [in, out] with `scales` [out].
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "int8": _int8,
    "fp8-rows": _fp8_rows,
    "fp8-whole": _fp8_whole,
}
#: The kernels for each type of inputs, the fastest first.
_CANDIDATES = {"int8": ("int8",), "fp8": ("fp8-rows", "fp8-whole")}
_SMALL = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def scaled_product(kernel: str, x: Tensor, numbers: Tensor, input_scale: Tensor, scales: Tensor, axis: int) -> Tensor:
    """The product over the channels of `x`, which are on `axis`, by the kernel of that name. See `KERNELS`."""
    last = x.movedim(axis, -1)
    y = KERNELS[kernel](last.reshape(-1, last.shape[-1]), numbers, input_scale, scales)
    return y.reshape(*last.shape[:-1], -1).movedim(-1, axis)


def choose_kernel(inputs: str, weights: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """The kernel for a layer whose inputs and weights [in, out] have these types. "": the device has none."""
    if inputs != weights or len(shape) != 2 or any(size % _MULTIPLE for size in shape):
        return ""
    return _best(inputs, dtype, device)


@cache
def _best(inputs: str, dtype: torch.dtype, device: torch.device) -> str:
    """The first candidate that runs on the device and is right. PyTorch does not say which GPUs and versions have which kernel."""
    if device.type != "cuda" or inputs not in _CANDIDATES:
        return ""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LEAST_ROWS, 64, generator=generator).to(device, dtype)
    numbers = (8 * torch.randn(48, 64, generator=generator)).round().to(device, _SMALL[inputs]).T
    scales = (torch.rand(48, generator=generator) + 0.5).to(device, dtype)
    input_scale = torch.tensor(1.0 / 16, device=device)
    for name in _CANDIDATES[inputs]:
        try:
            found = KERNELS[name](x, numbers, input_scale, scales).float()
        except RuntimeError:
            continue
        steps = (x.float() / input_scale).round() if inputs == "int8" else _fp8_steps(x, input_scale).float()
        wanted = (steps * input_scale) @ (numbers.float() * scales.float())
        if bool((found - wanted).norm() <= _TOLERANCE * wanted.norm()):
            return name
    return ""
