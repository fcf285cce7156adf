"""Where the layers of a transformer went in a deployment graph: found by building the graph, not by a table beside it.

A graph joins, scales and transposes weights on its way to its parameters. `trace_origins` builds it on the meta device, where
tensors are shapes without values, watches the operators that the constructors call, and follows each weight through those that
only move or scale numbers. What went through any other operator has no origin, so nothing is claimed that was not seen.
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
class _Part:
    """`factor` times the rows `held` of the weight of `module`, which is of this shape, in rows from `first` on of a matrix."""

    module: str
    shape: tuple[int, ...]
    held: tuple[int, int]
    first: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class _Origin:
    """What a tensor consists of: its parts one below the other, or, `transposed`, side by side."""

    parts: tuple[_Part, ...]
    transposed: bool = False


def trace_origins(build: Callable[[Mapping[str, Tensor]], nn.Module], weights: Mapping[str, Tensor]) -> tuple[LoraTarget, ...]:
    """The rows of each layer of `weights` (on the meta device, by name) that `build` takes as a matrix, in their order there.

    Layers are what a LoRA is for: a weight [out, in], or that of a 1x1 convolution [out, in, 1, 1].
    """
    tracer = _Tracer()
    for name, value in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and _is_matrix(value.shape):
            tracer.origins[value] = _Origin((_Part(module, tuple(value.shape), (0, value.shape[0])),))
    with torch.device("meta"), tracer, stored_in(tracer):
        graph = build(weights)
    order = {name.removesuffix(".weight"): index for index, name in enumerate(weights)}
    rows = []
    for name, parameter in graph.named_parameters():
        if (origin := tracer.origin_of(parameter)) is not None:
            traced = (part for part in origin.parts if part.module not in tracer.lost)
            rows += [_row(name, parameter, part, origin.transposed) for part in traced]
    return tuple(sorted(rows, key=lambda row: order[row.module]))


class _Tracer(TorchDispatchMode):
    """Origins of the tensors made while it is entered, and a keeper of parameters (`stored_in`) that remembers theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.origins = WeakTensorKeyDictionary()
        #: Layers of which something went where it cannot be followed.
        self.lost: set[str] = set()
        self._kept: list[tuple[Tensor, _Origin | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        origin = self._follow(func, args, result)
        if origin is not None:
            self.origins[result] = origin
        else:
            for value in tree_leaves(args):
                if isinstance(value, Tensor) and (lost := self.origins.get(value)) is not None:
                    self.lost |= {part.module for part in lost.parts}
        return result

    def keep(self, value: Tensor) -> Tensor:
        """`value` without values, and without memory, so that the address it has is its own."""
        kept = torch.empty(1, dtype=value.dtype, device="cpu").expand(value.shape)
        self._kept.append((kept, self.origins.get(value)))
        return kept

    def origin_of(self, parameter: Tensor) -> _Origin | None:
        """That of the tensor which `keep` made `parameter` of."""
        return next((origin for kept, origin in self._kept if kept.data_ptr() == parameter.data_ptr()), None)

    def _follow(self, func: Any, args: tuple[Any, ...], result: Tensor) -> _Origin | None:
        if func == _ops.cat.default:
            return self._join(args[0], args[1] if len(args) > 1 else 0)
        value = args[0] if args and isinstance(args[0], Tensor) else None
        origin = None if value is None else self.origins.get(value)
        if value is None or origin is None:
            return None
        if func in _SAME or (func in _VIEWS and _trimmed(result.shape) == _trimmed(value.shape)):
            return origin
        if func == _ops.mul.Tensor and isinstance(args[1], int | float):
            return replace(origin, parts=tuple(replace(part, factor=part.factor * args[1]) for part in origin.parts))
        if func == _ops.slice.Tensor and len(args) == 4 and args[1] == 0 and len(origin.parts) == 1 and not origin.transposed:
            rows = range(*origin.parts[0].held)[args[2] : args[3]]
            return _Origin((replace(origin.parts[0], held=(rows.start, rows.stop)),))
        if func in _TURNS and value.ndim == 2 and args[1:] in _TURNS[func]:
            return replace(origin, transposed=not origin.transposed)
        return None

    def _join(self, tensors: list[Tensor], axis: int) -> _Origin | None:
        origins = [self.origins.get(tensor) for tensor in tensors]
        if axis != 0 or any(origin is None or origin.transposed for origin in origins):
            return None
        parts, first = list[_Part](), 0
        for tensor, origin in zip(tensors, origins, strict=True):
            assert origin is not None
            parts += [replace(part, first=first + part.first) for part in origin.parts]
            first += tensor.shape[0]
        return _Origin(tuple(parts))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight is one of a linear layer or of a 1x1 convolution without groups (those of Sana with groups are larger)."""
    return len(shape) == 2 or (len(shape) == 4 and tuple(shape[2:]) == (1, 1))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """`shape` without the ones at its end."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _row(name: str, parameter: Tensor, part: _Part, transposed: bool) -> LoraTarget:
    dtype = str(parameter.dtype).removeprefix("torch.")
    held = None if part.held == (0, part.shape[0]) else part.held
    return LoraTarget(part.module, part.shape, name, tuple(parameter.shape), dtype, part.first, transposed, part.factor, held)
