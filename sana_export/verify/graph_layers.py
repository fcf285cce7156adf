"""Which layer of the model each tensor of an ONNX file belongs to.

The names of the weights in a file are those of the deployment graph's modules. A node without weights of its own belongs to the
layer whose weights were last used on the way to it. What nodes compute from weights alone is a weight too, such as the numbers of
a quantized matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile

import onnx

from sana_export.export.plain_fp4 import ADDED
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.records import LoraTarget

_FLOATS = {dtype.onnx: dtype.name for dtype in WEIGHT_DTYPES.values()}


@dataclass(frozen=True)
class TensorOrigin:
    """Where an intermediate tensor comes from."""

    #: Its name in the ONNX file.
    tensor: str
    #: Its dtype, as in formats/dtypes.py.
    dtype: str
    #: The node that computes it.
    node: str
    #: That node's type.
    operator: str
    #: The layer: "blocks.1". None before the first weights.
    layer: str | None
    #: The module whose weights the node reads.
    module: str | None
    #: That module's name in diffusers, if the manifest knows it; the beginning of it if the module joins several.
    diffusers: str | None
    #: The module whose weights were used last on the way to it. None: no weights come before.
    after: str | None
    #: The module whose weights are used next with what is made of it. None: no weights follow.
    before: str | None

    @property
    def place(self) -> str:
        """The layer, and between which modules."""
        if self.module is not None:
            return self.module + (f" (diffusers: {self.diffusers})" if self.diffusers else "")
        between = [f"{word} {name}" for word, name in (("after", self.after), ("before", self.before)) if name is not None]
        return ", ".join(between) or "no weights are near"


def tensor_origins(model: onnx.ModelProto, targets: Iterable[LoraTarget] = ()) -> list[TensorOrigin]:
    """The float tensors that the nodes of `model` compute, in the order of the nodes, which is topological.

    `model` has the dtype of every value. `targets` are the manifest's, for the names in diffusers. Values that
    `without_fp4` has added are left out.
    """
    graph = model.graph
    weights = _weights(graph)
    dtypes = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    own = [next((weights[name] for name in node.input if name in weights), None) for node in graph.node]
    after, before = _after(graph, own), _before(graph, own)
    known = _names_in_diffusers(targets)
    return [
        TensorOrigin(
            name,
            _FLOATS[dtypes[name]],
            node.name,
            node.op_type,
            _layer(module or after[name]),
            module,
            known.get(module) if module else None,
            after[name],
            before.get(name),
        )
        for node, module in zip(graph.node, own, strict=True)
        for name in node.output
        if dtypes.get(name) in _FLOATS and ADDED not in name
    ]


def _weights(graph: onnx.GraphProto) -> dict[str, str]:
    """Weight to its module: those that are stored, and those that nodes compute from these and from constants."""
    weights = {tensor.name: _module(tensor.name) for tensor in graph.initializer if "." in tensor.name or tensor.external_data}
    constants = {"", *(tensor.name for tensor in graph.initializer)}
    for node in graph.node:
        if constants.issuperset(node.input):
            constants |= set(node.output)
            module = next((weights[name] for name in node.input if name in weights), None)
            weights |= dict.fromkeys(node.output, module) if module else {}
    return weights


def _after(graph: onnx.GraphProto, own: list[str | None]) -> dict[str, str | None]:
    """Tensor to the module whose weights were used last on the way to it."""
    latest: dict[str, tuple[int, str | None]] = {}
    for index, (node, module) in enumerate(zip(graph.node, own, strict=True)):
        reached = max((latest[name] for name in node.input if name in latest), key=lambda item: item[0], default=(-1, None))
        latest |= dict.fromkeys(node.output, (index, module) if module else reached)
    return {name: module for name, (_, module) in latest.items()}


def _before(graph: onnx.GraphProto, own: list[str | None]) -> dict[str, str | None]:
    """Tensor to the module whose weights are used first with what is made of it."""
    nearest: dict[str, tuple[int, str | None]] = {}
    made: dict[str, tuple[int, str | None]] = {}
    end = len(graph.node)
    for index in reversed(range(end)):
        node, module = graph.node[index], own[index]
        ahead = min((nearest[name] for name in node.output if name in nearest), key=lambda item: item[0], default=(end, None))
        made |= {name: nearest[name] for name in node.output if name in nearest}
        mine = (index, module) if module else ahead
        for name in node.input:
            nearest[name] = min(nearest.get(name, mine), mine, key=lambda item: item[0])
    return {name: module for name, (_, module) in made.items()}


def _names_in_diffusers(targets: Iterable[LoraTarget]) -> dict[str, str]:
    """Module to its name in diffusers. If it joins several, what their names have in common: "transformer_blocks.1.attn1"."""
    names: dict[str, list[list[str]]] = {}
    for target in targets:
        names.setdefault(_module(target.initializer), []).append(target.module.split("."))
    return {module: ".".join(_common_beginning(parts)) for module, parts in names.items()}


def _common_beginning(names: list[list[str]]) -> list[str]:
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]


def _module(weight: str) -> str:
    """`weight` without its own name. A quantized one is stored as two (docs/bundle.md)."""
    return re.sub(r"\.(weight|bias)$", "", re.sub(r"\.(quantized|scale)$", "", weight))


def _layer(module: str | None) -> str | None:
    """A module's name up to its last number: "blocks.1" of "blocks.1.halves.value.inverted"."""
    parts = module.split(".") if module else []
    end = max((index for index, part in enumerate(parts) if part.isdecimal()), default=len(parts) - 1) + 1
    return ".".join(parts[:end]) or None
