"""Puts the quantized weights into an ONNX graph: `DequantizeLinear` nodes before the layers that read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir
from onnx_ir import Node, Value

from sana_export.export.quantize.weights import StoredWeight
from sana_export.formats.quantized import ONNX_TYPES, scale_shape
from sana_export.graphs.storage import Slice
from sana_export.manifest import QuantizedWeight


def insert_dequantize(model: onnx_ir.Model, stored: Mapping[str, StoredWeight], data: Path) -> None:
    """Replace the initializers in `stored` by integers and scales in the file `data`, and by the nodes that multiply them."""
    graph = model.graph
    for name, place in stored.items():
        given = graph.initializers.pop(name)
        assert given.dtype is not None  # an initializer has a type
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
                _read_transposed(graph, user, index, out, weight, tuple(given.shape or ()))
        else:
            given.replace_all_uses_with(out)


def _read_transposed(graph: onnx_ir.Graph, user: Node, index: int, matrix: Value, weight: QuantizedWeight, shape: tuple[int, ...]) -> None:
    """Let `user` read a weight [out, in, ...] of `shape` from `matrix` [in, out].

    TensorRT-RTX 1.7 compiles no transposed 4-bit matrix as a left factor. So a product W y becomes (y^T W^T)^T.
    """
    if user.op_type == "MatMul" and index == 0:
        other, result = user.inputs[1], user.outputs[0]
        assert other is not None
        assert result.shape is not None
        last = list(range(len(result.shape) - 2)) + [len(result.shape) - 1, len(result.shape) - 2]
        flipped = onnx_ir.node("Transpose", [other], {"perm": last}, name=f"{user.name}.input")
        product = onnx_ir.node("MatMul", [flipped.outputs[0], matrix], name=user.name)
        back = onnx_ir.node("Transpose", [product.outputs[0]], {"perm": last}, name=f"{user.name}.output")
        names = (result.name, f"{user.name}.input", f"{user.name}.product")
        for node, name, dims in zip(
            (back, flipped, product), names, (result.shape, _permuted(other.shape, last), _permuted(result.shape, last)), strict=True
        ):
            node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, result.type, dims
        graph.insert_before(user, [flipped, product, back])
        result.name = None
        result.replace_all_uses_with(back.outputs[0], replace_graph_outputs=True)
        graph.remove(user, safe=True)
        return
    assert user.op_type == "Conv" and index == 1, f"{weight.name} is read by input {index} of {user.op_type}"
    flipped = onnx_ir.node("Transpose", [matrix], {"perm": [1, 0]}, name=f"{weight.name}.transpose")
    sizes = Value(name=f"{weight.name}.shape", const_value=onnx_ir.tensor(np.array(shape, np.int64), name=f"{weight.name}.shape"))
    graph.register_initializer(sizes)
    kernel = onnx_ir.node("Reshape", [flipped.outputs[0], sizes], name=f"{weight.name}.reshape")
    for node, name, dims in zip((flipped, kernel), ("rows", "kernel"), ((shape[0], weight.shape[0]), shape), strict=True):
        node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = f"{weight.name}.{name}", matrix.type, onnx_ir.Shape(dims)
    graph.insert_before(user, [flipped, kernel])
    user.replace_input_with(index, kernel.outputs[0])


def _permuted(shape: onnx_ir.Shape | None, order: list[int]) -> onnx_ir.Shape | None:
    return None if shape is None else onnx_ir.Shape([shape[axis] for axis in order])


def _initializer(
    graph: onnx_ir.Graph, name: str, dtype: onnx_ir.DataType, shape: tuple[int, ...], place: Slice, data: Path
) -> Value:
    tensor = onnx_ir.ExternalTensor(
        data.name, place.offset, place.length, dtype, shape=onnx_ir.Shape(shape), name=name, base_dir=data.parent
    )
    value = Value(name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape), const_value=tensor)
    graph.register_initializer(value)
    return value
