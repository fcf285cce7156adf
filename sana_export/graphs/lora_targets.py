"""Where the layers of a transformer went in a deployment graph: found by building the graph, not by a table beside it.

A graph joins, scales and transposes weights on its way to its parameters. `trace_lora_targets` builds it on the meta device, where
tensors are shapes without values, watches the operators that the constructors call, and follows each weight through those that
only move or scale numbers. A tensor that any other operator made has no composition, so nothing is claimed that was not seen.
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
#: Operators that leave the numbers and their order in memory alone.
_SAME = {_ops.detach.default, _ops._to_copy.default, _ops.clone.default, _ops.alias.default}
_VIEWS = {_ops.view.default, _ops._unsafe_view.default, _ops.reshape.default, _ops.unsqueeze.default}
#: Transpositions of a matrix, with their other arguments.
_TURNS: dict[Any, tuple[tuple[Any, ...], ...]] = {
    _ops.t.default: ((),),
    _ops.numpy_T.default: ((),),
    _ops.permute.default: (([1, 0],),),
    _ops.transpose.int: ((0, 1), (1, 0)),
}


@dataclass(frozen=True)
class _RowBlock:
    """Some rows of a layer's weight, multiplied by a constant, as consecutive rows of a matrix."""

    #: The layer's name in diffusers.
    module: str
    #: The shape of the layer's weight.
    shape: tuple[int, ...]
    #: First and end of the weight's rows.
    source_rows: tuple[int, int]
    #: The row of the matrix that the first of them is.
    row_offset: int = 0
    #: The constant.
    factor: float = 1.0


@dataclass(frozen=True)
class _Composition:
    """The row blocks that a matrix consists of."""

    #: The blocks from top to bottom.
    blocks: tuple[_RowBlock, ...]
    #: Whether the matrix is transposed, with the blocks from left to right.
    transposed: bool = False


def trace_lora_targets(build: Callable[[Mapping[str, Tensor]], nn.Module], weights: Mapping[str, Tensor]) -> tuple[LoraTarget, ...]:
    """The rows of each layer of `weights` (on the meta device, by name) that `build` takes as a matrix, in their order there.

    Layers are what a LoRA is for: a weight [out, in], or that of a 1x1 convolution [out, in, 1, 1].
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
    """Origins of the tensors made while it is entered, and a keeper of parameters (`stored_in`) that remembers theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.compositions = WeakTensorKeyDictionary()
        #: Layers of which something went where it cannot be followed.
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
        """`value` without values, and without memory, so that the address it has is its own."""
        kept = torch.empty(1, dtype=value.dtype, device="cpu").expand(value.shape)
        self._kept.append((kept, self.compositions.get(value)))
        return kept

    def composition_of(self, parameter: Tensor) -> _Composition | None:
        """That of the tensor which `keep` made `parameter` of."""
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
        if func in _TURNS and value.ndim == 2 and args[1:] in _TURNS[func]:
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
    """Whether a weight is one of a linear layer or of a 1x1 convolution without groups (those of Sana with groups are larger)."""
    return len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without the ones at its end."""
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
