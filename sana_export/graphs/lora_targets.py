"""Finds where each layer's weight ends up in a deployment graph by watching the graph being built.

A graph's constructors concatenate, scale and transpose weights to make their parameters. `trace_lora_targets` builds the graph on
the meta device (shapes without values), watches the operators, and follows each weight through those that only move or scale
numbers. The result of any other operator has no known composition, so a layer that goes through one is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sana_export.graphs.storage import stored_in
from sana_export.manifest import LoraTarget

_ops = torch.ops.aten
#: Operators that keep the values and their order.
_SAME = {_ops.detach.default, _ops._to_copy.default, _ops.clone.default, _ops.alias.default}
_VIEWS = {_ops.view.default, _ops._unsafe_view.default, _ops.reshape.default, _ops.unsqueeze.default}
#: Operators that transpose a matrix, with the arguments that follow the matrix when they do.
_TRANSPOSES: dict[Any, tuple[tuple[Any, ...], ...]] = {
    _ops.t.default: ((),),
    _ops.numpy_T.default: ((),),
    _ops.permute.default: (([1, 0],),),
    _ops.transpose.int: ((0, 1), (1, 0)),
}


@dataclass(frozen=True)
class _RowBlock:
    """Rows of a layer's weight, times a constant, that are consecutive rows of a matrix."""

    #: The layer's name in diffusers.
    module: str
    #: The shape of the layer's weight.
    shape: tuple[int, ...]
    #: The first of the weight's rows, and the row after the last one.
    source_rows: tuple[int, int]
    #: The row of the matrix at which they start.
    row_offset: int = 0
    #: The constant that they are multiplied by.
    factor: float = 1.0


@dataclass(frozen=True)
class _Composition:
    """The row blocks that make up a matrix."""

    #: The blocks from top to bottom.
    blocks: tuple[_RowBlock, ...]
    #: Whether the matrix is transposed, so that the blocks go from left to right.
    transposed: bool = False


def trace_lora_targets(build: Callable[[Mapping[str, Tensor]], nn.Module], weights: Mapping[str, Tensor]) -> tuple[LoraTarget, ...]:
    """Where the graph that `build` makes stores each layer of `weights`, in the order of `weights`.

    `weights` are tensors on the meta device by name. A layer is what a LoRA can change: a weight [out, in] or the weight of a 1x1
    convolution [out, in, 1, 1].
    """
    tracer = _Tracer()
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and _is_matrix(value.shape):
            tracer.compositions[value] = _Composition((_RowBlock(module, tuple(value.shape), (0, value.shape[0])),))
    with torch.device("meta"), tracer, stored_in(tracer):
        graph = build(weights)
    order = {name.removesuffix(".weight"): index for index, name in enumerate(weights)}
    rows = []
    for name, parameter in graph.named_parameters():
        if (composition := tracer.composition_of(parameter)) is not None:
            traced = (block for block in composition.blocks if block.module not in tracer.lost)
            rows += [_row(name, parameter, block, composition.transposed) for block in traced]
    return tuple(sorted(rows, key=lambda row: order[row.module]))


class _Tracer(TorchDispatchMode):
    """Follows the composition of every tensor that is made inside it.

    It is also the storage for `stored_in`, so that it knows the composition of each parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.compositions = WeakTensorKeyDictionary()
        #: Layers that went through an operator that is not followed.
        self.lost: set[str] = set()
        self._kept: list[tuple[Tensor, _Composition | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        composition = self._follow(func, args, result)
        if composition is not None:
            self.compositions[result] = composition
        else:
            for value in tree_leaves(args):
                if isinstance(value, Tensor) and (lost := self.compositions.get(value)) is not None:
                    self.lost |= {block.module for block in lost.blocks}
        return result

    def keep(self, value: Tensor) -> Tensor:
        """A stand-in for `value` that takes no memory but has an address of its own, by which `composition_of` recognizes it."""
        kept = torch.empty(1, dtype=value.dtype, device="cpu").expand(value.shape)
        self._kept.append((kept, self.compositions.get(value)))
        return kept

    def composition_of(self, parameter: Tensor) -> _Composition | None:
        """The composition of the tensor that `keep` turned into `parameter`."""
        return next((composition for kept, composition in self._kept if kept.data_ptr() == parameter.data_ptr()), None)

    def _follow(self, func: Any, args: tuple[Any, ...], result: Tensor) -> _Composition | None:
        if func == _ops.cat.default:
            return self._join(args[0], args[1] if len(args) > 1 else 0)
        value = args[0] if args and isinstance(args[0], Tensor) else None
        composition = None if value is None else self.compositions.get(value)
        if value is None or composition is None:
            return None
        if func in _SAME or (func in _VIEWS and _trimmed(result.shape) == _trimmed(value.shape)):
            return composition
        if func == _ops.mul.Tensor and isinstance(args[1], int | float):
            return replace(composition, blocks=tuple(replace(block, factor=block.factor * args[1]) for block in composition.blocks))
        block, *others = composition.blocks
        if func == _ops.slice.Tensor and len(args) == 4 and args[1] == 0 and not others and not composition.transposed:
            rows = range(*block.source_rows)[args[2] : args[3]]
            return _Composition((replace(block, source_rows=(rows.start, rows.stop)),))
        if func in _TRANSPOSES and value.ndim == 2 and args[1:] in _TRANSPOSES[func]:
            return replace(composition, transposed=not composition.transposed)
        return None

    def _join(self, tensors: list[Tensor], axis: int) -> _Composition | None:
        compositions = [self.compositions.get(tensor) for tensor in tensors]
        if axis != 0 or any(composition is None or composition.transposed for composition in compositions):
            return None
        blocks, offset = list[_RowBlock](), 0
        for tensor, composition in zip(tensors, compositions, strict=True):
            assert composition is not None
            blocks += [replace(block, row_offset=offset + block.row_offset) for block in composition.blocks]
            offset += tensor.shape[0]
        return _Composition(tuple(blocks))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight belongs to a linear layer or to a 1x1 convolution. (Sana's grouped convolutions are larger than 1x1.)"""
    return len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without trailing ones."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _row(name: str, parameter: Tensor, block: _RowBlock, transposed: bool) -> LoraTarget:
    dtype = str(parameter.dtype).removeprefix("torch.")
    source_rows = None if block.source_rows == (0, block.shape[0]) else block.source_rows
    return LoraTarget(
        block.module, block.shape, name, tuple(parameter.shape), dtype, block.row_offset, transposed, block.factor, source_rows
    )
