"""Counts the work of an ONNX file at given sizes of its dynamic axes. No weights are read and the graph is not run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.defs import get_schema
from onnx.reference import ReferenceEvaluator
from onnx.shape_inference import infer_node_outputs

from sana_export.bench.work.count import Product, Work
from sana_export.errors import ArtifactError
from sana_export.export.plain_fp4 import DYNAMIC_QUANTIZE, block_of

#: Tensors of at most this many numbers are computed, because shapes are made from them.
_MOST_NUMBERS = 64
Shape = tuple[int, ...]


def onnx_work(path: Path, sizes: Mapping[str, int]) -> Work:
    """The work of the file at `path`. `sizes` has the length of each symbolic axis."""
    return Work.of(onnx_products(path, sizes))


def onnx_products(path: Path, sizes: Mapping[str, int]) -> list[Product]:
    """The products of the file in the order of its nodes. Raises ArtifactError if a size is missing or a shape is unknown."""
    model = onnx.load(path, load_external_data=False)
    values = _Values(path, model, sizes)
    products = []
    for node in model.graph.node:
        values.add(node)
        if (flop := FLOP.get(node.op_type)) is not None:
            tensors = [name for name in (*node.input, *node.output) if name]
            shapes = [values.shape(name) for name in node.input if name], values.shape(node.output[0])
            products.append(Product(node.name, node.op_type, flop(node, *shapes), sum(values.bytes(name) for name in set(tensors))))
    return products


def _matmul(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * inputs[0][-1]


def _conv(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    return 2 * math.prod(output) * math.prod(inputs[1][1:])  # the kernel is [out, in / groups, ...]


def _gemm(node: NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(output) * inputs[0][0 if transposed else 1]


#: Operator to the function that counts its FLOP from the shapes of its inputs and its output. Other operators count as free.
FLOP: dict[str, Callable[[NodeProto, Sequence[Shape], Shape], int]] = {"MatMul": _matmul, "Conv": _conv, "Gemm": _gemm}


class _Values:
    """The types of a graph's tensors, and the values of the small ones, which shapes are made from."""

    def __init__(self, path: Path, model: onnx.ModelProto, sizes: Mapping[str, int]) -> None:
        self.path = path
        self.opsets = {opset.domain: opset.version for opset in model.opset_import}
        self.types: dict[str, TypeProto] = {}
        self.known: dict[str, npt.NDArray[Any]] = {}
        for tensor in model.graph.initializer:
            self.types[tensor.name] = helper.make_tensor_type_proto(tensor.data_type, tensor.dims)
            if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= _MOST_NUMBERS:
                self.known[tensor.name] = numpy_helper.to_array(tensor)
        for value in model.graph.input:
            tensor_type = value.type.tensor_type
            shape = [self._size(axis, sizes) for axis in tensor_type.shape.dim]
            self.types[value.name] = helper.make_tensor_type_proto(tensor_type.elem_type, shape)

    def add(self, node: NodeProto) -> None:
        """Infer the outputs of `node` from its inputs."""
        inputs = [name for name in node.input if name]
        if node.op_type == "Shape":
            self._keep(node.output[0], np.array(_sliced(node, self.shape(inputs[0])), np.int64))
            return
        if node.op_type == DYNAMIC_QUANTIZE:  # onnx has no schema of TensorRT's operator
            *axes, channels = self.shape(inputs[0])
            self.types[node.output[0]] = helper.make_tensor_type_proto(TensorProto.FLOAT4E2M1, [*axes, channels])
            self.types[node.output[1]] = helper.make_tensor_type_proto(
                TensorProto.FLOAT8E4M3FN, [*axes, channels // block_of(node)]
            )
            return
        if all(name in self.known for name in inputs) and (outputs := self._computed(node, inputs)) is not None:
            for name, array in zip(node.output, outputs, strict=True):
                self._keep(name, array)
            return
        inferred = infer_node_outputs(
            get_schema(node.op_type, self.opsets[node.domain], node.domain),
            node,
            {name: self.types[name] for name in inputs},
            {name: numpy_helper.from_array(self.known[name]) for name in inputs if name in self.known},
            opset_imports=[helper.make_opsetid(*opset) for opset in self.opsets.items()],
        )
        self.types.update(inferred)

    def shape(self, name: str) -> Shape:
        axes = self.types[name].tensor_type.shape.dim
        if not all(axis.HasField("dim_value") for axis in axes):
            raise ArtifactError(f"the work of {self.path} cannot be counted", found=f"no shape of {name}", wanted="a known shape")
        return tuple(axis.dim_value for axis in axes)

    def bytes(self, name: str) -> int:
        dtype = helper.tensor_dtype_to_np_dtype(self.types[name].tensor_type.elem_type)
        return math.prod(self.shape(name)) * int(dtype.itemsize)

    def _keep(self, name: str, array: npt.NDArray[Any]) -> None:
        self.known[name] = array
        self.types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    def _computed(self, node: NodeProto, inputs: Sequence[str]) -> list[npt.NDArray[Any]] | None:
        """The outputs of a node whose inputs are known. None if they may be large."""
        if not all(self.known[name].size <= _MOST_NUMBERS for name in inputs) or node.op_type in ("Expand", "ConstantOfShape"):
            return None
        graph = helper.make_graph(
            [node],
            "node",
            [helper.make_value_info(name, self.types[name]) for name in dict.fromkeys(inputs)],
            [helper.make_empty_tensor_value_info(name) for name in node.output],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in self.opsets.items()])
        outputs: Any = ReferenceEvaluator(model).run(None, {name: self.known[name] for name in inputs})
        return [np.asarray(output) for output in outputs]

    def _size(self, axis: Any, sizes: Mapping[str, int]) -> int:
        if axis.HasField("dim_value"):
            return int(axis.dim_value)
        if axis.dim_param not in sizes:
            raise ArtifactError(
                f"the work of {self.path} cannot be counted", found=f"no size of {axis.dim_param}", wanted="a number"
            )
        return sizes[axis.dim_param]


def _sliced(node: NodeProto, shape: Shape) -> Shape:
    """The output of a Shape node: all axes, or those from `start` to `end`."""
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
