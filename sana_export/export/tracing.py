"""A torch module to a program of ATen operators that `torch.onnx` translates one by one, traced once.

`torch.onnx.export` decomposes a program by tracing it twice more, with functional tensors and symbolic sizes: half of the time that
an export takes. Our graphs need little of that: four operators exchanged for others, and reshapes with every size spelled out.
`exchange_operators` and `spell_out_sizes` do this in place, so that `_TracedOnce` is not traced again, and the ONNX model is the
same but for the names of intermediate tensors.
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
#: A node of torch.fx, whose arguments are typed as everything that they might be.
Node = Any
#: The longest that an axis may be.
LONGEST = 1 << 20

#: Operator to what `run_decompositions` makes of it: another operator, arguments and keyword arguments.
_EQUIVALENTS: Mapping[Any, Callable[..., tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    aten.to.dtype: lambda x, dtype: (aten._to_copy.default, (x,), {"dtype": dtype}),
    aten.square.default: lambda x: (aten.pow.Tensor_Scalar, (x, 2), {}),
    aten.chunk.default: lambda x, chunks, axis=0: (aten.split.Tensor, (x, -(-x.meta["val"].shape[axis] // chunks), axis), {}),
    aten.rsub.Scalar: lambda x, other: (aten.sub.Tensor, (other, x), {}),
}
_RESHAPES = {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
#: Nodes that compute a size.
_SIZES = {aten.sym_size.int, operator.mul, operator.add, operator.sub}


def dynamic_shapes(spec: GraphSpec) -> tuple[dict[int, Any], ...]:
    """The dynamic axes of each input of `spec`, as torch.export takes them."""
    return tuple(
        {index: Dim(axis, min=1, max=LONGEST) for index, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in spec.inputs
    )


def trace(module: nn.Module, spec: GraphSpec, inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """`module` as a program whose dynamic axes are those of `spec`; `inputs` are examples of its inputs."""
    with _frugal():
        program = torch.export.export(
            module,
            tuple(inputs.values()),
            dynamic_shapes=dynamic_shapes(spec),
            # Else a broadcast over an axis would forbid the length 1.
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    exchange_operators(program)
    spell_out_sizes(program)
    return _TracedOnce(program)


def exchange_operators(program: ExportedProgram) -> None:
    """Exchange the operators of `_EQUIVALENTS` for what equals them. Afterwards none of them is left."""
    for node in program.graph.nodes:
        if (equivalent := _EQUIVALENTS.get(node.target)) is not None:
            node.target, node.args, node.kwargs = equivalent(*node.args, **node.kwargs)


def spell_out_sizes(program: ExportedProgram) -> None:
    """Make every reshape, flatten and unflatten a `view`. Afterwards none of them is left.

    Torch's translation of a flatten reads the sizes of its input at run time; those of a view are numbers, or computed once from
    the sizes of the graph's inputs.
    """
    sizes = _Sizes(program)
    for node in program.graph.nodes:
        if node.target not in _RESHAPES:
            continue
        source, copies = node.args[0], not _is_view(node)
        # Of something contiguous a reshape keeps its -1, as in `run_decompositions`.
        as_given = node.target == aten.reshape.default and source.meta["val"].is_contiguous()
        shape = node.args[1] if as_given else sizes.of(node)
        if copies:
            with program.graph.inserting_before(node):
                copy = program.graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
            copy.meta = source.meta.copy()
            source = copy
        node.target, node.args, node.kwargs = aten.view.default, (source, shape), {}


class _Sizes:
    """The nodes of a program that compute sizes, by what they compute."""

    def __init__(self, program: ExportedProgram) -> None:
        self._graph = program.graph
        # Of several that compute the same, the one that most others read already.
        known = [node for node in program.graph.nodes if node.target in _SIZES and isinstance(node.meta["val"], SymInt)]
        self._nodes = {_key(node.meta["val"]): node for node in sorted(known, key=lambda node: len(node.users))}

    def of(self, node: Node) -> list[int | Node]:
        """The shape of what `node` returns; -1 for an axis that a reshape is left to find out."""
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
        """`size`, which is that of an axis of what `node` flattens or unflattens, or of those that it flattens."""
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
        """Have `size`, and what it is computed from, computed before `node`."""
        if node < size:
            for source in size.all_input_nodes:
                self._move_before(node, source)
            node.prepend(size)


def _key(size: SymInt) -> Any:
    """The expression of a size in those of the graph's inputs: equal for equal sizes."""
    return size.node.expr


def _is_view(node: Node) -> bool:
    """Whether what a node returns lies in the memory of its first argument."""
    return StorageWeakRef(node.meta["val"].untyped_storage()) == StorageWeakRef(node.args[0].meta["val"].untyped_storage())


class _TracedOnce(ExportedProgram):
    """A program that is traced again only where there is something to decompose or to make functional."""

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
    """Whether an operator changes one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@contextlib.contextmanager
def _frugal() -> Iterator[None]:
    """Tracing without what a single trace does not need, and with the sizes 0 and 1 like any other, as torch.onnx does it.

    To remember what operators make of symbolic shapes takes longer than it saves.
    """
    dynamo: Any = importlib.import_module("torch._dynamo.config")
    symbolic_shapes: Any = importlib.import_module("torch.fx.experimental._config")
    with dynamo.patch(fake_tensor_cache_enabled=False), symbolic_shapes.patch(backed_size_oblivious=True):
        yield
