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

from sana_export.formats.quantized import FP8_MAX
from sana_export.records import QuantizedWeight

#: A function of torch -> which of its arguments is the weight -> the axis of the other argument that the weight's inputs are on.
_PRODUCTS: dict[Callable[..., Any], dict[int, int]] = {
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
        for place, axis in _PRODUCTS.get(function, {}).items():
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

    #: The type that the input is rounded to, "int8" or "fp8". "": it is not rounded.
    inputs: str = ""
    #: The number that one step of the rounded input stands for.
    scale: float = 1.0
    #: Factors of the input's channels [in]. None: 1.
    factor: Tensor | None = None
    #: The branch beside the layer, [in, rank] and [rank, out]. None: there is none.
    down: Tensor | None = None
    up: Tensor | None = None

    def to(self, device: torch.device) -> ProductForm:
        """The same on `device`."""
        moved = (None if tensor is None else tensor.to(device) for tensor in (self.factor, self.down, self.up))
        return ProductForm(self.inputs, self.scale, *moved)


class QuantizedProducts(ProductMode):
    """Computes the layers of `module` that have a form, by the names of their weights."""

    def __init__(self, module: nn.Module, forms: Mapping[str, ProductForm]) -> None:
        super().__init__({name: module.get_parameter(name) for name in forms})
        self._forms = forms

    def product(self, name: str, multiply: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
        form = self._forms[name]
        if form.factor is not None:
            x = x * form.factor.reshape(-1, *[1] * (-axis - 1))
        y = multiply(rounded(x, form.inputs, form.scale))
        if form.down is not None and form.up is not None:
            y = y + _through(form.up, _through(form.down, x, axis), axis)
        return y


def rounded(x: Tensor, dtype: str, scale: float) -> Tensor:
    """`x` in the steps of `dtype` and `scale`, as ONNX's QuantizeLinear and DequantizeLinear compute it."""
    if not dtype:
        return x
    steps = x.float() / scale
    steps = steps.round().clamp(-128, 127) if dtype == "int8" else steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
    return (steps * scale).to(x.dtype)


def _through(matrix: Tensor, x: Tensor, axis: int) -> Tensor:
    """The product of `x` and `matrix` [in, out] over the channels of `x` on `axis`."""
    if axis == -1:
        return x @ matrix
    return matrix.T @ x if axis == -2 else conv2d(x, matrix.T[..., None, None])


def product_form(weight: QuantizedWeight, tensors: Mapping[str, Tensor]) -> ProductForm | None:
    """The form of the layer with `weight`. None: a plain product. `tensors` are its stored ones, by the end of their names."""
    if not (weight.inputs or weight.rescaled or weight.rank):
        return None
    inputs, outputs = weight.shape[:2]  # a branch belongs to a weight that is stored as [in, out]
    return ProductForm(
        weight.inputs,
        float(tensors["input.scale"]) if weight.inputs else 1.0,
        tensors["input.factor"].flatten() if weight.rescaled else None,
        tensors["low_rank.down"].reshape(inputs, weight.rank) if weight.rank else None,
        tensors["low_rank.up"].reshape(weight.rank, outputs) if weight.rank else None,
    )


def compute_quantized(module: nn.Module, forms: Mapping[str, ProductForm]) -> None:
    """Make `module` compute the layers in `forms`, by the names of their weights, in these forms, and all others as they are."""
    module.__dict__.pop("forward", None)
    if not forms:
        return
    reference, placed = weakref.ref(module), dict[torch.device, Mapping[str, ProductForm]]()

    def quantized(*args: Any, **kwargs: Any) -> Any:
        own = reference()  # the module holds this function, and would hold itself
        assert own is not None
        device = own.get_parameter(next(iter(forms))).device
        if device not in placed:  # once: a copy to a GPU cannot be captured
            placed[device] = {name: form.to(device) for name, form in forms.items()}
        with QuantizedProducts(own, placed[device]):
            return type(own).forward(own, *args, **kwargs)

    module.forward = quantized


def has_forms(module: nn.Module) -> bool:
    """Whether `compute_quantized` gave forms to layers of `module`."""
    return "forward" in module.__dict__
