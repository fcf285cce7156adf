"""FP4 in operators that ONNX Runtime has, so that the graph of an `nvfp4` file can run on a CPU.

ONNX Runtime 1.32 has no kernel for FP4, and what rounds inputs to FP4 is an operator of TensorRT. The rewritten graph reads the
same initializers of the same file: the bits of two FP4 numbers in a byte are two UINT4 numbers, which a table turns into FP4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from sana_export.formats.quantized import FP4_MAX, FP4_NUMBERS

#: TensorRT's operator: an input and a global scale -> its FP4 numbers, and the FP8 scales of its blocks.
DYNAMIC_QUANTIZE = "TRT_FP4DynamicQuantize"
#: What the names of values contain that the rewritten graph has and the file does not.
ADDED = "//"


def without_fp4(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with FP4 replaced, in place. It then has no dtypes of intermediate values. A model without FP4 stays as it is.

    The names of new values contain `ADDED`. No name in an exported file does.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT4E2M1}
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == DYNAMIC_QUANTIZE}
    if not weights and not rounded:
        return model
    for tensor in weights.values():
        tensor.data_type = TensorProto.UINT4
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    steps = _Steps()
    for node in graph.node:
        first = node.input[0] if node.input else ""
        if node.op_type == DYNAMIC_QUANTIZE:
            _round_input(steps, node)
        elif node.op_type == "DequantizeLinear" and first in rounded:
            numbers = steps.add("Cast", [f"{first}//levels"], f"{first}//cast", to=types[node.input[1]])
            product = steps.add("Mul", [numbers, node.input[1]], f"{first}//product")
            shape = steps.add("Shape", [rounded[first]], f"{first}//sizes")
            steps.add("Reshape", [product, shape], node.output[0])
        elif node.op_type == "DequantizeLinear" and first in weights:
            codes = steps.add("Cast", [first], f"{first}//codes", to=TensorProto.INT32)
            table = steps.constant(FP4_NUMBERS, helper.tensor_dtype_to_np_dtype(types[node.input[1]]))
            inputs, outputs = weights[first].dims
            numbers = steps.add("Gather", [table, codes], f"{first}//numbers")
            blocks = steps.add("Reshape", [numbers, steps.constant([-1, block_of(node), outputs])], f"{first}//blocks")
            scales = steps.add("Unsqueeze", [node.input[1], steps.constant([1])], f"{first}//scales")
            product = steps.add("Mul", [blocks, scales], f"{first}//product")
            steps.add("Reshape", [product, steps.constant([inputs, outputs])], node.output[0])
        else:
            steps.nodes.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(steps.nodes)
    graph.initializer.extend(steps.constants.values())
    return model


def has_fp4(model: onnx.ModelProto) -> bool:
    """Whether `model` has FP4 weights, or had them before `without_fp4`."""
    return any(tensor.data_type in (TensorProto.FLOAT4E2M1, TensorProto.UINT4) for tensor in model.graph.initializer)


class _Steps:
    """Nodes and constants of a graph."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """The output of a new node."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, values: float | Sequence[float], dtype: np.dtype | None = None) -> str:
        """An initializer with these values: of int64 if all are integers, otherwise of float32, unless there is a `dtype`."""
        array = np.array(values, dtype)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = f"//{array.dtype.name}{array.tolist()}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name


def _round_input(steps: _Steps, node: NodeProto) -> None:
    """The FP4 numbers of an input, in float32 [blocks, numbers of a block], and their FP8 scales [blocks, 1].

    The scale of a block is its largest magnitude over 6 and the global scale. The numbers are the nearest ones, and ties go to the
    number whose last bit is 0: the distance between two is 0.5 up to 2, 1 up to 4, then 2. A block whose scale would be zero is
    zero.
    """
    (given, whole), (numbers, scales) = node.input, node.output

    def add(kind: str, *inputs: str, output: str = "", **attributes: int) -> str:
        return steps.add(kind, inputs, output or f"{numbers}//{len(steps.nodes)}", **attributes)

    half, one, two, zero = map(steps.constant, (0.5, 1.0, 2.0, 0.0))
    over = add("Div", add("Cast", given, to=TensorProto.FLOAT), whole)
    blocks = add("Reshape", over, steps.constant([-1, block_of(node)]))
    largest = add("ReduceMax", add("Abs", blocks), steps.constant([-1]))
    add("QuantizeLinear", add("Div", largest, steps.constant(FP4_MAX)), one, output=scales, output_dtype=TensorProto.FLOAT8E4M3FN)
    # A DequantizeLinear with two readers would cost memory: ONNX Runtime copies it for the second one, and runs what reads the copy
    # after all other nodes that are ready. Those decode weights, so all weights would be in memory at once, in float32.
    own = add("Cast", scales, to=TensorProto.FLOAT)
    levels = add("Div", blocks, add("Where", add("Greater", own, zero), own, steps.constant(np.inf)))
    sizes = add("Abs", levels)
    distance = add("Where", add("Less", sizes, steps.constant(4.0)), one, two)
    distance = add("Where", add("Less", sizes, two), half, distance)
    nearest = add("Mul", add("Round", add("Div", levels, distance)), distance)
    add("Clip", nearest, steps.constant(-FP4_MAX), steps.constant(FP4_MAX), output=f"{numbers}//levels")


def block_of(node: NodeProto) -> int:
    """How many numbers share a scale in what `node` writes or reads."""
    return int(helper.get_node_attr_value(node, "block_size"))
