"""Puts quantized layers into an ONNX graph: `DequantizeLinear` nodes before the layers that read the weights, and what rounds the
layers' inputs, multiplies them by factors, and adds the branch to the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
from onnx_ir import Node, Value

from sana_export.export.quantize.graph_values import WeightProduct, permutation, permuted, products, shape_of, undone
from sana_export.export.quantize.weights import StoredWeight
from sana_export.formats.dtypes import DTYPES
from sana_export.formats.quantized import ONNX_TYPES
from sana_export.graphs.storage import Slice
from sana_export.quantization.schemes import BLOCK

#: The domain of TensorRT's own operators.
TENSORRT = "trt"
#: [B, C, H, W] to [B, H, W, C], and back.
_CHANNELS_LAST, _CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def insert_dequantize(model: onnx_ir.Model, stored: Mapping[str, StoredWeight], data: Path) -> None:
    """Replace the initializers in `stored` by small numbers and scales in the file `data`, and add what the layers have besides."""
    shared: _Known = {}
    for name, place in stored.items():
        _Layer(model.graph, name, place, data, shared).insert()
    if shared:
        model.graph.sort()  # a layer may come before the one whose rounded input it reads


#: An input and the weight of the first layer that rounds it -> the multiplied and the rounded input.
_Known = dict[tuple[Value, str], tuple[Value, Value]]


class _Layer:
    """One quantized weight of a graph, and its products. `shared`: inputs that other layers have rounded to FP4."""

    def __init__(self, graph: onnx_ir.Graph, name: str, place: StoredWeight, data: Path, shared: _Known) -> None:
        given = graph.initializers.pop(name)
        assert given.dtype is not None
        self._graph, self._name, self._place, self._data = graph, name, place, data
        self._given, self._dtype, self._weight, self._shared = given, given.dtype, place.weight, shared

    def insert(self) -> None:
        """Put the layer into the graph."""
        shape, out = shape_of(self._given).numpy(), self._dequantize()
        if self._weight.transposed:
            for user, index in tuple(self._given.uses()):
                self._read_transposed(user, index, out, shape)
        else:
            self._given.replace_all_uses_with(out)
        if self._weight.inputs or self._weight.rescaled or self._weight.rank:
            known = self._shared if self._weight.inputs == "fp4" else {}
            for product in products(out):
                self._complete(product, known)

    def _dequantize(self) -> Value:
        """The numbers that the stored ones stand for. They get the name of the weight."""
        weight = self._weight
        kind = onnx_ir.DataType(ONNX_TYPES[weight.dtype])
        values = self._initializer("quantized", kind, weight.shape, self._place.values)
        attributes = {"axis": weight.axis, **({"block_size": weight.block} if weight.block else {})}
        first, scale = self._graph[0], self._tensor("scale")
        if weight.dtype == "fp4":
            scale = self._wide_scales(first, scale, self._tensor("tensor_scale"), f"{self._name}.scale")
        node = onnx_ir.node("DequantizeLinear", [values, scale], attributes, name=f"{self._name}.dequantize")
        (out,) = node.outputs
        out.type, out.shape = self._given.type, onnx_ir.Shape(weight.shape)
        self._graph.insert_before(first, node)
        self._given.name, out.name = None, self._name
        return out

    def _wide_scales(self, before: Node, scales: Value, whole: Value, name: str) -> Value:
        """FP8 `scales` times the float32 number `whole`, in the graph's precision."""
        shape, wide = shape_of(scales), onnx_ir.DataType.FLOAT
        found = self._node(before, "DequantizeLinear", [scales, whole], f"{name}.wide", shape, wide)
        if self._dtype == wide:
            return found
        return self._node(before, "Cast", [found], f"{name}.cast", shape, self._dtype, to=self._dtype.value)

    def _complete(self, product: WeightProduct, known: _Known) -> None:
        """Give `product` the layer's own input, and its output the branch. `known`: inputs that have been made already."""
        node, given = product.node, product.node.inputs[product.other]
        assert given is not None
        key = given, self._weight.shares or self._name
        if key not in known:
            known[key] = self._input(node, given)
        multiplied, rounded = known[key]
        node.replace_input_with(product.other, rounded)
        if self._weight.rank:
            self._add_branch(node, multiplied)

    def _input(self, before: Node, given: Value) -> tuple[Value, Value]:
        """The layer's input multiplied by its factors, and rounded after that.

        Each layer has nodes and constants of its own, even if another one reads the same input: ONNX Runtime takes integer kernels
        only if one layer reads the rounded numbers. Not so with FP4: TensorRT-RTX 1.7 crashes if a tensor is rounded twice.
        """
        prefix, shape = f"{given.name}.{self._name}", shape_of(given)
        multiplied = given
        if self._weight.rescaled:
            multiplied = self._node(before, "Mul", [given, self._tensor("input.factor")], f"{prefix}.multiplied", shape)
        if not self._weight.inputs:
            return multiplied, multiplied
        if self._weight.inputs == "fp4":
            return multiplied, self._round_blocks(before, multiplied, prefix)
        scale, zero = self._tensor("input.scale"), self._zero()
        steps = self._node(before, "QuantizeLinear", [multiplied, scale, zero], f"{prefix}.steps", shape, zero.dtype)
        return multiplied, self._node(before, "DequantizeLinear", [steps, scale, zero], f"{prefix}.rounded", shape, self._dtype)

    def _round_blocks(self, before: Node, given: Value, prefix: str) -> Value:
        """`given` in FP4, in blocks along its last axis whose scales are found at run time.

        The operator is TensorRT's, and takes two or three axes. Between reshapes to and from them, products are of FP4 numbers too.
        """
        whole, shape, rows = self._tensor("input.scale"), shape_of(given), given
        if len(shape) > 3:
            sizes = self._constant(f"{self._name}.input.rows", np.array([1, -1, shape[-1]], np.int64))
            rows = self._node(before, "Reshape", [given, sizes], f"{prefix}.rows", onnx_ir.Shape([1, None, shape[-1]]))
        blocks = onnx_ir.Shape([*shape_of(rows)[:-1], shape[-1] // BLOCK])
        attributes = {"axis": -1, "block_size": BLOCK, "scale_type": ONNX_TYPES["fp8"]}
        node = onnx_ir.node(
            "TRT_FP4DynamicQuantize", [rows, whole], attributes, domain=TENSORRT, num_outputs=2, name=f"{prefix}.steps"
        )
        steps, scales = node.outputs
        steps.name, steps.shape, steps.type = f"{prefix}.steps", shape_of(rows), onnx_ir.TensorType(onnx_ir.DataType.FLOAT4E2M1)
        scales.name, scales.shape, scales.type = f"{prefix}.scales", blocks, onnx_ir.TensorType(onnx_ir.DataType.FLOAT8E4M3FN)
        self._graph.insert_before(before, node)
        self._graph.opset_imports[TENSORRT] = 1
        wide, numbers = self._wide_scales(before, scales, whole, f"{prefix}.scales"), f"{prefix}.rounded"
        found = self._node(
            before, "DequantizeLinear", [steps, wide], numbers, shape_of(rows), self._dtype, axis=-1, block_size=BLOCK
        )
        if rows is given:
            return found
        sizes = self._node(before, "Shape", [given], f"{prefix}.shape", onnx_ir.Shape([len(shape)]), onnx_ir.DataType.INT64)
        return self._node(before, "Reshape", [found, sizes], f"{numbers}.back", shape, self._dtype)

    def _add_branch(self, node: Node, x: Value) -> None:
        """Add x down up to the output of `node`."""
        (out,), rank = node.outputs, self._weight.rank
        users, before = tuple(out.uses()), self._graph[self._graph.index(node) + 1]
        kind, down, up, axis = "MatMul", self._tensor("low_rank.down"), self._tensor("low_rank.up"), -1
        if node.op_type == "Conv":
            inputs, outputs = self._weight.shape
            kind, axis = "Conv", 1
            down, up = self._kernel(before, down, (rank, inputs, 1, 1)), self._kernel(before, up, (outputs, rank, 1, 1))
        shape = list(shape_of(x))
        shape[axis] = rank
        low = self._node(before, kind, [x, down], f"{node.name}.{self._name}.low", onnx_ir.Shape(shape))
        branch = self._node(before, kind, [low, up], f"{node.name}.{self._name}.branch", shape_of(out))
        total = self._node(before, "Add", [out, branch], f"{node.name}.{self._name}.sum", shape_of(out))
        for user, index in users:
            user.replace_input_with(index, total)

    def _read_transposed(self, user: Node, index: int, matrix: Value, shape: tuple[int, ...]) -> None:
        """Let input `index` of `user` read a weight [out, in, ...] of `shape` from `matrix` [in, out]."""
        if (user.op_type, index) == ("MatMul", 0):
            self._swap_factors(user, matrix)
        elif (user.op_type, index) == ("Conv", 1) and self._weight.on_the_right:
            self._replace_convolution(user, matrix)
        elif (user.op_type, index) == ("Conv", 1):
            user.replace_input_with(index, self._kernel(user, matrix, shape))
        else:
            raise AssertionError(f"{matrix.name} is read by input {index} of {user.op_type}")

    def _swap_factors(self, product: Node, matrix: Value) -> None:
        """A product W y of matrices becomes (y^T W^T)^T: TensorRT-RTX 1.7 compiles no 4-bit matrix as a left factor."""
        other, result = product.inputs[1], product.outputs[0]
        assert other is not None
        rank = len(shape_of(result))
        order = [*range(rank - 2), rank - 1, rank - 2]
        flipped = undone(other, order)
        if flipped is None:
            flipped = self._node(
                product, "Transpose", [other], f"{product.name}.input", permuted(shape_of(other), order), perm=order
            )
        swapped = self._node(product, "MatMul", [flipped, matrix], f"{product.name}.product", permuted(shape_of(result), order))
        back = self._node(product, "Transpose", [swapped], f"{product.name}.output", shape_of(result), perm=order)
        result.replace_all_uses_with(back, replace_graph_outputs=True)
        self._graph.remove(product, safe=True)
        self._remove_unused(other)

    def _replace_convolution(self, conv: Node, matrix: Value) -> None:
        """A 1x1 convolution becomes a product over the last axis: ONNX Runtime has integer products, but convolutions with integers
        only if their outputs are rounded too. TensorRT-RTX 1.7 has products of FP4, and no convolutions.
        """
        given, result = conv.inputs[0], conv.outputs[0]
        assert given is not None
        last = undone(given, _CHANNELS_FIRST)
        if last is None:
            shape = permuted(shape_of(given), _CHANNELS_LAST)
            last = self._node(conv, "Transpose", [given], f"{conv.name}.pixels", shape, perm=_CHANNELS_LAST)
        shape = permuted(shape_of(result), _CHANNELS_LAST)
        y = self._node(conv, "MatMul", [last, matrix], f"{conv.name}.product", shape)
        if len(conv.inputs) > 2 and (bias := conv.inputs[2]) is not None:
            y = self._node(conv, "Add", [y, bias], f"{conv.name}.biased", shape)
        for user, _ in tuple(result.uses()):
            if user.op_type == "Transpose" and permutation(user) == _CHANNELS_LAST:
                user.outputs[0].replace_all_uses_with(y, replace_graph_outputs=True)
                self._graph.remove(user, safe=True)
        if result.uses() or result.is_graph_output():
            back = self._node(conv, "Transpose", [y], f"{conv.name}.channels", shape_of(result), perm=_CHANNELS_FIRST)
            result.replace_all_uses_with(back, replace_graph_outputs=True)
        self._graph.remove(conv, safe=True)
        self._remove_unused(given)

    def _remove_unused(self, value: Value) -> None:
        """Remove the node that computes `value` if nothing reads it any more."""
        if (producer := value.producer()) is not None and not value.uses() and not value.is_graph_output():
            self._graph.remove(producer, safe=True)

    def _kernel(self, before: Node, matrix: Value, shape: tuple[int, ...]) -> Value:
        """`matrix` [in, out] as the kernel of a convolution, of `shape` [out, in, 1, 1]."""
        sizes = self._constant(f"{matrix.name}.shape", np.array(shape, np.int64))
        rows = self._node(before, "Transpose", [matrix], f"{matrix.name}.rows", onnx_ir.Shape(shape[:2]), perm=[1, 0])
        return self._node(before, "Reshape", [rows, sizes], f"{matrix.name}.kernel", onnx_ir.Shape(shape))

    def _node(
        self,
        before: Node,
        kind: str,
        inputs: list[Value],
        name: str,
        shape: onnx_ir.Shape,
        dtype: onnx_ir.DataType | None = None,
        **attributes: Any,
    ) -> Value:
        """The output of a new node before another one, of `dtype` or the type of its first input. Both have the same name."""
        node = onnx_ir.node(kind, inputs, attributes, name=name)
        (out,) = node.outputs
        out.name, out.shape = name, shape
        out.type = inputs[0].type if dtype is None else onnx_ir.TensorType(dtype)
        self._graph.insert_before(before, node)
        return out

    def _zero(self) -> Value:
        """The zero point, whose type is that of the rounded numbers."""
        kind = onnx_ir.DataType(ONNX_TYPES[self._weight.inputs])
        return self._constant(f"{self._name}.input.zero", np.zeros((), kind.numpy()))

    def _constant(self, name: str, array: np.ndarray) -> Value:
        tensor = onnx_ir.tensor(array, name=name)
        shape = onnx_ir.Shape(array.shape)
        return self._registered(Value(name=name, type=onnx_ir.TensorType(tensor.dtype), shape=shape, const_value=tensor))

    def _tensor(self, end: str) -> Value:
        """The layer's tensor with this end of its name."""
        place, shape = self._place.tensors[end]
        kind = self._weight.tensors(self._dtype.numpy().name)[end]
        number = ONNX_TYPES[kind] if kind in ONNX_TYPES else DTYPES[kind].onnx
        return self._initializer(end, onnx_ir.DataType(number), shape, place)

    def _initializer(self, end: str, dtype: onnx_ir.DataType, shape: tuple[int, ...], place: Slice) -> Value:
        name = self._weight.tensor_name(end)
        tensor = onnx_ir.ExternalTensor(
            self._data.name, place.offset, place.length, dtype, shape=onnx_ir.Shape(shape), name=name, base_dir=self._data.parent
        )
        return self._registered(Value(name=name, type=onnx_ir.TensorType(dtype), shape=onnx_ir.Shape(shape), const_value=tensor))

    def _registered(self, value: Value) -> Value:
        """`value` as an initializer, or the one of its name that is there already."""
        assert value.name is not None
        if (known := self._graph.initializers.get(value.name)) is not None:
            return known
        self._graph.register_initializer(value)
        return value
