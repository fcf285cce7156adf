"""Puts the quantized weights into an ONNX graph: `DequantizeLinear` nodes before the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import Node, Value

from sana_export.export.quantize.weights import StoredWeight
from sana_export.formats.quantized import ONNX_TYPES, scale_shape
from sana_export.graphs.storage import Slice


def insert_dequantize(model: onnx_ir.Model, stored: Mapping[str, StoredWeight], data: Path) -> None:
    """Replace the initializers in `stored` by integers and scales in the file `data`, and by the nodes that multiply them."""
    graph = model.graph
    for name, place in stored.items():
        given = graph.initializers.pop(name)
        assert given.dtype is not None
        assert given.shape is not None
        weight = place.weight
        shape = scale_shape(weight.shape, weight.axis, weight.block)
        integers = onnx_ir.DataType(ONNX_TYPES[weight.dtype])
        values = _initializer(graph, f"{name}.quantized", integers, weight.shape, place.values, data)
        scales = _initializer(graph, f"{name}.scale", given.dtype, shape, place.scales, data)
        attributes = {"axis": weight.axis, **({"block_size": weight.block} if weight.block else {})}
        dequantize = onnx_ir.node("DequantizeLinear", [values, scales], attributes, name=f"{name}.dequantize")
        (out,) = dequantize.outputs
        out.type, out.shape = given.type, onnx_ir.Shape(weight.shape)
        graph.insert_before(graph[0], dequantize)
        given.name, out.name = None, name
        if weight.transposed:
            for user, index in tuple(given.uses()):
                _read_transposed(graph, user, index, out, given.shape.numpy())
        else:
            given.replace_all_uses_with(out)


def _read_transposed(graph: onnx_ir.Graph, user: Node, index: int, matrix: Value, shape: tuple[int, ...]) -> None:
    """Let input `index` of `user` read a weight [out, in, ...] of `shape` from `matrix` [in, out]."""
    if (user.op_type, index) == ("MatMul", 0):
        _swap_factors(graph, user, matrix)
    elif (user.op_type, index) == ("Conv", 1):
        user.replace_input_with(index, _kernel(graph, user, matrix, shape))
    else:
        raise AssertionError(f"{matrix.name} is read by input {index} of {user.op_type}")


def _swap_factors(graph: onnx_ir.Graph, product: Node, matrix: Value) -> None:
    """A product W y of matrices becomes (y^T W^T)^T: TensorRT-RTX 1.7 compiles no 4-bit matrix as a left factor."""
    other, result = product.inputs[1], product.outputs[0]
    assert other is not None
    assert other.shape is not None
    assert result.shape is not None
    order = [*range(len(result.shape) - 2), len(result.shape) - 1, len(result.shape) - 2]
    flipped = _node(graph, product, "Transpose", [other], f"{product.name}.input", _permuted(other.shape, order), perm=order)
    swapped = _node(graph, product, "MatMul", [flipped, matrix], f"{product.name}.product", _permuted(result.shape, order))
    back = _node(graph, product, "Transpose", [swapped], f"{product.name}.output", result.shape, perm=order)
    result.replace_all_uses_with(back, replace_graph_outputs=True)
    graph.remove(product, safe=True)


def _kernel(graph: onnx_ir.Graph, conv: Node, matrix: Value, shape: tuple[int, ...]) -> Value:
    """`matrix` [in, out] as the kernel of `conv`, of `shape` [out, in, 1, 1]."""
    sizes = Value(name=f"{matrix.name}.shape", const_value=onnx_ir.tensor(np.array(shape, np.int64), name=f"{matrix.name}.shape"))
    graph.register_initializer(sizes)
    rows = _node(graph, conv, "Transpose", [matrix], f"{matrix.name}.rows", onnx_ir.Shape(shape[:2]), perm=[1, 0])
    return _node(graph, conv, "Reshape", [rows, sizes], f"{matrix.name}.kernel", onnx_ir.Shape(shape))


def _node(
    graph: onnx_ir.Graph, before: Node, kind: str, inputs: list[Value], name: str, shape: onnx_ir.Shape, **attributes: Any
) -> Value:
    """The output of a new node before another one, of the type of its first input. Node and output have the same name."""
    node = onnx_ir.node(kind, inputs, attributes, name=name)
    (out,) = node.outputs
    out.name, out.type, out.shape = name, inputs[0].type, shape
    graph.insert_before(before, node)
    return out


def _permuted(shape: onnx_ir.Shape, order: list[int]) -> onnx_ir.Shape:
    return onnx_ir.Shape([shape[axis] for axis in order])


def _initializer(
    graph: onnx_ir.Graph, name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...], place: Slice, data: Path
) -> Value:
    tensor = onnx_ir.ExternalTensor(
        data.name, place.offset, place.length, dtype, shape=onnx_ir.Shape(shape), name=name, base_dir=data.parent
    )
    value = Value(name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value
