"""The products of a graph's weights with their inputs, seen from outside: to observe the inputs, or to compute with quantized ones.

A graph's modules stay as they are. While a `ProductMode` is active, each matrix product or convolution with one of its weights goes
through `product`.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

from sana_export.formats.quantized import FP4_MAX, FP8_MAX
from sana_export.quantization.schemes import BLOCK
from sana_export.records import QuantizedWeight

#: A function of torch -> which of its arguments is the weight -> the axis of the other argument that the weight's inputs are on.
PRODUCTS: dict[Callable[..., Any], dict[int, int]] = {
    torch.Tensor.matmul: {0: -2, 1: -1},
    torch.matmul: {0: -2, 1: -1},
    torch.conv2d: {1: -3},
}


class ProductMode(TorchFunctionMode):
    """Calls `product` for every product of a weight in `weights`, by name, or of a part of it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._weights = sorted((weight.data_ptr(), weight.nbytes, name) for name, weight in weights.items())

    def product(self, name: str, multiply: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
        """The result for input `x`, whose channels are on `axis`. `multiply` computes it without this mode."""
        raise NotImplementedError

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, axis in PRODUCTS.get(function, {}).items():
            if (name := self._weight_at(args[place].data_ptr())) is not None:
                return self.product(name, partial(_multiply, function, args, 1 - place, kwargs), args[1 - place], axis)
        return function(*args, **kwargs)

    def _weight_at(self, address: int) -> str | None:
        """The weight whose memory contains `address`."""
        place = bisect_right(self._weights, address, key=lambda weight: weight[0]) - 1
        if place < 0:
            return None
        start, size, name = self._weights[place]
        return name if address < start + size else None


def _multiply(function: Callable[..., Any], args: Sequence[Any], place: int, kwargs: Mapping[str, Any], x: Tensor) -> Any:
    """`function` with `x` as its argument at `place`."""
    return function(*args[:place], x, *args[place + 1 :], **kwargs)


@dataclass(frozen=True, eq=False)
class ProductForm:
    """How a quantized layer computes: y = round(x * factor) W + (x * factor) down up. The weight W is in the graph's module."""

    #: The type that the input is rounded to, "int8", "fp8" or "fp4". "": it is not rounded.
    inputs: str = ""
    #: The number that one step of the rounded input stands for. FP4: what the scales of its blocks are multiplied by.
    scale: float | Tensor = 1.0
    #: Factors of the input's channels [in]. None: 1.
    factor: Tensor | None = None
    #: The branch beside the layer, [in, rank] and [rank, out]. None: there is none.
    down: Tensor | None = None
    up: Tensor | None = None

    def product(self, multiply: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
        """y for the input `x`, whose channels are on `axis`. `multiply` rounds its argument and multiplies it by W."""
        if self.factor is not None:
            x = x * self.factor.reshape(-1, *[1] * (-axis - 1))
        y = multiply(x)
        return y if self.down is None or self.up is None else y + _through(self.up, _through(self.down, x, axis), axis)


class QuantizedProducts(ProductMode):
    """Computes the layers of `module` that have a form, by the names of their weights."""

    def __init__(self, module: nn.Module, forms: Mapping[str, ProductForm]) -> None:
        super().__init__({name: module.get_parameter(name) for name in forms})
        self._forms = forms

    def product(self, name: str, multiply: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
        form = self._forms[name]
        return form.product(lambda x: multiply(rounded(x, form.inputs, form.scale, axis)), x, axis)


def rounded(x: Tensor, dtype: str, scale: float | Tensor, axis: int = -1) -> Tensor:
    """`x`, whose channels are on `axis`, in the steps of `dtype` and `scale`, as ONNX's QuantizeLinear and DequantizeLinear compute
    it, or for "fp4" TensorRT's TRT_FP4DynamicQuantize and DequantizeLinear."""
    if not dtype:
        return x
    steps = x.float() / scale
    if dtype == "fp4":
        return _rounded_blocks(steps.movedim(axis, -1), scale, x.dtype).movedim(-1, axis)
    steps = steps.round().clamp(-128, 127) if dtype == "int8" else _fp8(steps)
    return (steps * scale).to(x.dtype)


def _rounded_blocks(steps: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`steps` [..., channels] times `scale` in FP4, with a scale in FP8 for each block. A block whose scale is zero is zero."""
    blocks = steps.unflatten(-1, (-1, BLOCK))
    scales = _fp8(blocks.abs().amax(-1, keepdim=True) / FP4_MAX)
    numbers = _fp4(blocks / scales.where(scales > 0, torch.inf))
    return (numbers.to(dtype) * (scales * scale).to(dtype)).flatten(-2)


def to_fp8(x: Tensor) -> Tensor:
    """The nearest numbers of FP8 E4M3, in that type."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def _fp8(x: Tensor) -> Tensor:
    return to_fp8(x).float()


def _fp4(x: Tensor) -> Tensor:
    """The nearest numbers of FP4 E2M1: the distance between two is 0.5 up to 2, 1 up to 4, then 2."""
    steps = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return ((x / steps).round() * steps).clamp(-FP4_MAX, FP4_MAX)


def _through(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """The product of `x` and `matrix` [in, out] over the channels of `x` on `axis`."""
    if axis == -1:
        return x @ matrix
    return matrix.T @ x if axis == -2 else conv2d(x, matrix.T[..., None, None])


def product_form(weight: QuantizedWeight, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> ProductForm | None:
    """The form of the layer with `weight` in a graph of `dtype`. None: a plain product.

    `tensors` are the layer's stored ones, by the end of their names.
    """
    if not (weight.inputs or weight.rescaled or weight.rank):
        return None
    inputs, outputs = weight.shape[:2]  # a branch belongs to a weight that is stored as [in, out]
    return ProductForm(
        weight.inputs,
        float(tensors["input.scale"]) if weight.inputs else 1.0,
        tensors["input.factor"].flatten().to(dtype) if weight.rescaled else None,
        tensors["low_rank.down"].reshape(inputs, weight.rank).to(dtype) if weight.rank else None,
        tensors["low_rank.up"].reshape(weight.rank, outputs).to(dtype) if weight.rank else None,
    )


def compute_quantized(module: nn.Module, forms: Mapping[str, ProductForm]) -> None:
    """Make `module` compute the layers in `forms`, by the names of their weights, in these forms, and all others as they are."""
    module.__dict__.pop("forward", None)
    if not forms:
        return
    reference = weakref.ref(module)

    def quantized(*args: Any, **kwargs: Any) -> Any:
        own = reference()  # the module holds this function, and would hold itself
        assert own is not None
        with QuantizedProducts(own, forms):
            return type(own).forward(own, *args, **kwargs)

    module.forward = quantized
