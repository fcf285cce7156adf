"""Weights that stay quantized on the device: tensors that a graph's modules multiply like any other.

A `QuantizedTensor` stands for the numbers of a plain weight. A matrix product or a convolution with it computes what the layer of
the ONNX file computes: it rounds the input, multiplies it by the weight and adds the low-rank branch. Every other use reads
a plain tensor, which only a weight without such extras can give. torch.compile traces both, as any tensor that consists of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sana_export.graphs.fp8_product import LEAST_ROWS, fp8_product
from sana_export.graphs.products import PRODUCTS, ProductForm, rounded

#: The tensors inside of it that may be missing.
_OPTIONAL = ("input_scale", "factor", "down", "up")
_aten = torch.ops.aten
#: What happens to the inner tensors, so that the result is quantized too.
_ON_INNER = {_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten._to_copy.default}


@dataclass(frozen=True)
class Layout:
    """How the small numbers of a weight are stored. All layers of one kind have the same, so torch.compile compiles them once."""

    #: The type of the small numbers: "int8", "int4", "fp8" or "fp4". "": they are plain numbers in the weight's shape.
    dtype: str
    #: Their shape, before 4-bit numbers were packed.
    shape: tuple[int, ...]
    #: The axis of it that the scales go along.
    axis: int = 0
    #: How many of them along the axis share a scale. 0: each index of the axis has one scale.
    block: int = 0
    #: They are [in, out], and the weight is [out, in] or [out, in, 1, 1].
    transposed: bool = False
    #: The type that the layer's input is rounded to. "": it is not rounded.
    inputs: str = ""
    #: Whether rounded inputs are multiplied by the small numbers (fp8_product.py). If not, both are widened first.
    kernel: bool = False


class QuantizedTensor(Tensor):
    """A weight of shape `size` as `numbers` and `scales`, with the tensors of its layer (`ProductForm`)."""

    stored_as: Layout
    numbers: Tensor
    scales: Tensor
    input_scale: Tensor | None
    factor: Tensor | None
    down: Tensor | None
    up: Tensor | None

    @staticmethod
    def __new__(
        cls, numbers: Tensor, scales: Tensor, layout: Layout, size: Sequence[int], parts: Mapping[str, Tensor]
    ) -> QuantizedTensor:
        make: Any = Tensor._make_wrapper_subclass  # PyTorch's documented way to make a tensor of inner tensors
        made: QuantizedTensor = make(cls, torch.Size(size), dtype=scales.dtype, device=numbers.device)
        return made

    def __init__(self, numbers: Tensor, scales: Tensor, layout: Layout, size: Sequence[int], parts: Mapping[str, Tensor]) -> None:
        self.numbers, self.scales, self.stored_as = numbers, scales, layout
        for name in _OPTIONAL:
            setattr(self, name, parts.get(name))

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        present = [name for name in _OPTIONAL if getattr(self, name) is not None]
        return ["numbers", "scales", *present], self.stored_as

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], layout: Layout, size: Sequence[int], stride: Any) -> QuantizedTensor:
        parts = {name: inner[name] for name in _OPTIONAL if name in inner}
        return QuantizedTensor(inner["numbers"], inner["scales"], layout, size, parts)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for PyTorch's cache of it."""
        inner = {name: getattr(self, name) for name in self.__tensor_flatten__()[0]}
        kinds = [(name, part.dtype, tuple(part.shape), part.stride(), str(part.device)) for name, part in inner.items()]
        return repr((tuple(self.shape), self.stored_as, kinds))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"QuantizedTensor({tuple(self.shape)}, {self.stored_as})"

    def wide(self) -> Tensor:
        """The plain weight."""
        layout = self.stored_as
        if not layout.dtype:
            return self.numbers
        values = small_numbers(self.numbers, layout).to(self.scales.dtype)
        if layout.block:
            values = values.unflatten(layout.axis, (-1, layout.block)) * self.scales.unsqueeze(layout.axis + 1)
            values = values.flatten(layout.axis, layout.axis + 1)
        else:
            values = values * self.scales.reshape(-1, *[1] * (len(layout.shape) - layout.axis - 1))
        return (values.T if layout.transposed else values).reshape(self.shape)

    def product(self, function: Callable[..., Any], args: Sequence[Any], place: int, axis: int, kwargs: Any) -> Tensor:
        """`function` of `args`, of which this tensor is at `place`; the channels of the other factor are on `axis`."""
        layout, scale = self.stored_as, self.input_scale
        form = ProductForm(layout.inputs, 1.0 if scale is None else scale, self.factor, self.down, self.up)

        def multiply(x: Tensor) -> Tensor:
            if layout.kernel and scale is not None and x.numel() // x.shape[axis] >= LEAST_ROWS:
                y = fp8_product(x, self.numbers, scale, self.scales, axis)
                bias = args[2] if len(args) > 2 else None  # of a convolution
                return y if bias is None else y + bias.reshape(-1, *[1] * (-axis - 1))
            arguments = [*args]
            arguments[place], arguments[1 - place] = self.wide(), rounded(x, form.inputs, form.scale, axis)
            found: Tensor = function(*arguments, **kwargs)
            return found

        return form.product(multiply, args[1 - place], axis)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, axis in PRODUCTS.get(function, {}).items():
            if place < len(args) and isinstance(args[place], QuantizedTensor):
                return args[place].product(function, args, place, axis, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _ON_INNER and kwargs.get("dtype") is None:
            whole = args[0]
            names, layout = whole.__tensor_flatten__()
            inner = {name: function(getattr(whole, name), *args[1:], **kwargs) for name in names}
            return cls.__tensor_unflatten__(inner, layout, whole.shape, None)
        if function._schema.is_mutable:
            raise RuntimeError(f"{function} cannot write into a quantized weight")
        return function(*(_plain(value) for value in args), **{key: _plain(value) for key, value in kwargs.items()})


def small_numbers(stored: Tensor, layout: Layout) -> Tensor:
    """The numbers of `layout` before their scales. Two 4-bit numbers share a byte, the first in its lower half."""
    if layout.dtype in ("int8", "fp8"):
        return stored
    halves = torch.stack([stored & 0xF, stored >> 4], -1).flatten()[: math.prod(layout.shape)].reshape(layout.shape)
    if layout.dtype == "fp4":
        return _fp4_numbers(halves)
    return halves.to(torch.int8) - ((halves & 8) << 1).to(torch.int8)


def _fp4_numbers(codes: Tensor) -> Tensor:
    """The numbers with these bits, in float32 (`formats.quantized.FP4_NUMBERS`). A table would be copied from the host."""
    size = (codes & 7).float()
    size = torch.where(size < 4, size / 2, torch.where(size < 6, size - 2, 2 * size - 8))
    return torch.where(codes < 8, size, -size)


def _plain(value: Any) -> Any:
    """`value`, as a plain tensor if it is quantized, also in lists."""
    if isinstance(value, QuantizedTensor):
        if layer := [name for name in _OPTIONAL if getattr(value, name) is not None]:
            raise RuntimeError(f"a layer with {', '.join(layer)} is more than its weight: only a whole product can use it")
        return value.wide()
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value
