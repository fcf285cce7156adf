"""Traces a torch module once, into a program that `torch.onnx` translates operator by operator.

`torch.onnx.export` decomposes a program by tracing it twice more, which took half of an export's time. Our graphs need little of
that: other forms of four operators, and reshapes with every size spelled out. `exchange_operators` and `spell_out_sizes` do this in
place, and `_TracedOnce` keeps the exporter from tracing again. The ONNX model is the same, except for the names of intermediate
tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.multiprocessing.reductions import StorageWeakRef

from sana_export.contract import GraphSpec

aten = torch.ops.aten
#: A node of torch.fx. Its own types allow so much that they say nothing.
Node = Any
#: The largest length of a dynamic axis.
LONGEST = 1 << 20
#: Every axis may have the length 1.
ANY_LENGTH: Mapping[str, int] = {}

#: Operator to its form after `run_decompositions`: another operator, arguments and keyword arguments.
_EQUIVALENTS: Mapping[Any, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    aten.to.dtype: lambda x, dtype: (aten._to_copy.default, (x,), {"dtype": dtype}),
    aten.square.default: lambda x: (aten.pow.Tensor_Scalar, (x, 2), {}),
    aten.chunk.default: lambda x, chunks, axis=0: (aten.split.Tensor, (x, -(-x.meta["val"].shape[axis] // chunks), axis), {}),
    aten.rsub.Scalar: lambda x, other: (aten.sub.Tensor, (other, x), {}),
}
_RESHAPES = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
#: Nodes that compute a size.
_SIZES = {aten.sym_size.int, operator.mul, operator.add, operator.sub, operator.floordiv}


def dynamic_shapes(spec: GraphSpec, least: Mapping[str, int] = ANY_LENGTH) -> dict[str, dict[int, Any]]:
    """The dynamic axes of each input of `spec` by name, as torch.export takes them.

    `least`: the shortest length of an axis, if not 1.
    """
    named = {tensor.name: enumerate(tensor.shape) for tensor in spec.inputs}
    return {
        name: {index: Dim(axis, min=least.get(axis, 1), max=LONGEST) for index, axis in axes if isinstance(axis, str)}
        for name, axes in named.items()
    }


def trace(
    module: nn.Module, spec: GraphSpec, inputs: Mapping[str, Tensor], least: Mapping[str, int] = ANY_LENGTH
) -> ExportedProgram:
    """Trace `module` on the example `inputs` into a program with the dynamic axes of `spec` (see `dynamic_shapes`)."""
    with _frugal():
        program = torch.export.export(
            module,
            (),
            dict(inputs),
            dynamic_shapes=dynamic_shapes(spec, least),
            # Otherwise a broadcast over an axis would forbid the length 1.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    exchange_operators(program)
    spell_out_sizes(program)
    return _TracedOnce(program)


def exchange_operators(program: ExportedProgram) -> None:
    """Replace every operator of `_EQUIVALENTS` by its equivalent."""
    for node in program.graph.nodes:
        if (equivalent := _EQUIVALENTS.get(node.target)) is not None:
            node.target, node.args, node.kwargs = equivalent(*node.args, **node.kwargs)


def spell_out_sizes(program: ExportedProgram) -> None:
    """Replace every reshape, flatten and unflatten by a `view`.

    Torch's translation of a flatten reads the sizes of its input at run time; those of a view are numbers, or computed once from
    the sizes of the graph's inputs.
    """
    sizes = _Sizes(program)
    for node in program.graph.nodes:
        if node.target not in _RESHAPES:
            continue
        source, copies = node.args[0], not _is_view(node)
        # `run_decompositions` keeps the -1 of a reshape of a contiguous tensor too.
        as_given = node.target == aten.reshape.default and source.meta["val"].is_contiguous()
        shape = node.args[1] if as_given else sizes.of(node)
        if copies:
            with program.graph.inserting_before(node):
                copy = program.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
            copy.meta = source.meta.copy()
            source = copy
        node.target, node.args, node.kwargs = aten.view.default, (source, shape), {}


class _Sizes:
    """The nodes of a program that compute sizes, by the size."""

    def __init__(self, program: ExportedProgram) -> None:
        self._graph = program.graph
        # If several compute the same size, use the one with the most users.
        known = [node for node in program.graph.nodes if node.target in _SIZES and isinstance(node.meta["val"], SymInt)]
        self._nodes = {_key(node.meta["val"]): node for node in sorted(known, key=lambda node: len(node.users))}

    def of(self, node: Node) -> list[int | Node]:
        """The shape of the output of `node`; -1 for an axis that the reshape infers."""
        return [self._size(size, node) for size in node.meta["val"].shape]

    def _size(self, size: int | SymInt, node: Node) -> int | Node:
        if not isinstance(size, SymInt):
            return size
        if _key(size) not in self._nodes:
            if node.target == aten.reshape.default:
                return -1
            self._nodes[_key(size)] = self._computed(size, node)
        found = self._nodes[_key(size)]
        self._move_before(node, found)
        return found

    def _computed(self, size: SymInt, node: Node) -> Node:
        """A node that computes `size`: an axis of the input of `node`, or the product of the axes that `node` flattens."""
        source, first, last = (*node.args, -1)[:3]
        shape = source.meta["val"].shape
        keys = [_key(axis) if isinstance(axis, SymInt) else axis for axis in shape]
        if _key(size) in keys:
            with self._graph.inserting_before(node):
                computed = self._graph.call_function(aten.sym_size.int, (source, keys.index(_key(size))))
        else:
            factors = [self._size(axis, node) for axis in shape[first : last % len(shape) + 1]]
            with self._graph.inserting_before(node):
                computed = functools.reduce(lambda a, b: self._graph.call_function(operator.mul, (a, b)), factors)
        computed.meta["val"] = size
        return computed

    def _move_before(self, node: Node, size: Node) -> None:
        """Move `size`, and the nodes that it is computed from, before `node`."""
        if node < size:
            for source in size.all_input_nodes:
                self._move_before(node, source)
            node.prepend(size)


def _key(size: SymInt) -> Any:
    """A size as an expression of the sizes of the graph's inputs. Equal sizes have equal expressions."""
    return size.node.expr


def _is_view(node: Node) -> bool:
    """Whether the output of a node shares the memory of its first argument."""
    return StorageWeakRef(node.meta["val"].untyped_storage()) == StorageWeakRef(node.args[0].meta["val"].untyped_storage())


class _TracedOnce(ExportedProgram):
    """A program that is traced again only if it has something to decompose or an operator that writes in place."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=[program.verifier],
        )

    def run_decompositions(
        self, decomp_table: dict[Any, Callable[..., Any]] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        if decomp_table is None or any(node.target in decomp_table or _writes(node) for node in self.graph.nodes):
            return super().run_decompositions(decomp_table, decompose_custom_triton_ops)
        return self


def _writes(node: Node) -> bool:
    """Whether an operator writes to one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@contextlib.contextmanager
def _frugal() -> Iterator[None]:
    """Trace without the cache of fake tensors, which costs more than it saves here, and treat sizes 0 and 1 like any other.

    torch.onnx traces with the latter setting too. Both settings are restored afterwards.
    """
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    symbolic_shapes: Any = importlib.import_module("torch.fx.experimental._config")
    with dynamo.patch(fake_tensor_cache_enabled=False), symbolic_shapes.patch(backed_size_oblivious=True):
        yield
