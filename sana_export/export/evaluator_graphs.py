"""Rewrites of ONNX graphs for the evaluators: in float32, with or without rounding, cut, in another order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from sana_export.export.plain_fp4 import DYNAMIC_QUANTIZE, without_fp4

HALF: dict[int, str] = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
#: Operators that round inputs of layers.
ROUNDING = ("QuantizeLinear", DYNAMIC_QUANTIZE)
#: Operators that only move values. Their outputs are rounded already.
MOVES = {
    *("Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Pad"),
    *("Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}


def cut(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The part of `model` that computes `tensors`, which become its outputs. Each is computed by a node and has a known dtype."""
    types = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    needed, nodes = set(tensors), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for kept in (part.graph.node, part.graph.output, part.graph.initializer, part.graph.value_info):
        del kept[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.output.extend(types[name] for name in tensors)
    part.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    part.graph.value_info.extend(value for value in model.graph.value_info if value.name in needed)
    return part


def typed_model(path: Path, *, round_inputs: bool = True) -> onnx.ModelProto:
    """The model with the dtype of every value inferred, and FP4 in operators that ONNX Runtime has. Its weights stay on disk.

    Without `round_inputs`, layers whose inputs the graph rounds read them as they are.
    """
    model = onnx.load(path, load_external_data=False)
    if not round_inputs:
        read_unrounded_inputs(model)
    return onnx.shape_inference.infer_shapes(without_fp4(model))


def read_unrounded_inputs(model: onnx.ModelProto) -> None:
    """Remove every pair of an operator of `ROUNDING` and DequantizeLinear from `model`, and what computes the latter's scales."""
    whole, gone = dict[str, str](), set[str]()
    kept = []
    for node in model.graph.node:
        if node.op_type in ROUNDING:
            whole[node.output[0]] = node.input[0]
            gone.update(node.output)
        elif node.op_type == "DequantizeLinear" and node.input[0] in whole:
            whole[node.output[0]] = whole[node.input[0]]
        elif gone.intersection(node.input):
            gone.update(node.output)
        else:
            node.input[:] = [whole.get(name, name) for name in node.input]
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def half_values(model: onnx.ModelProto) -> dict[str, int]:
    """Name to dtype of every half-precision input, output and intermediate tensor."""
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    typed = {value.name: value.type.tensor_type.elem_type for value in values}
    return {name: dtype for name, dtype in typed.items() if dtype in HALF}


def widen(model: onnx.ModelProto, *, store: bool) -> onnx.ModelProto:
    """The model, computing in float32. With `store`, every half-precision value is rounded to its dtype when it is computed."""
    half = half_values(model)
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.node[:], graph.value_info[:]
    nodes: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type in HALF:
            nodes.append(_cast(f"{tensor.name}//stored", tensor.name, TensorProto.FLOAT))
            tensor.name = f"{tensor.name}//stored"
    for value in (*graph.input, *graph.output):
        if value.name in half:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for original in model.graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        _widen_attributes(node)
        rounded = [name for name in node.output if store and name in half and node.op_type not in MOVES]
        node.output[:] = [f"{name}//wide" if name in rounded else name for name in node.output]
        nodes.append(node)
        for name in rounded:
            nodes.append(_cast(f"{name}//wide", f"{name}//stored", half[name]))
            nodes.append(_cast(f"{name}//stored", name, TensorProto.FLOAT))
    graph.node.extend(weights_when_needed(nodes, {tensor.name for tensor in graph.initializer}))
    widened = onnx.ModelProto()
    widened.CopyFrom(model)
    widened.graph.CopyFrom(graph)
    return widened


def weights_when_needed(nodes: Sequence[NodeProto], weights: Collection[str]) -> list[NodeProto]:
    """`nodes` in an order in which a node that computes from `weights` alone comes right before the first one that reads it.

    Sessions run the nodes in this order. So a weight is in float32 only while its layer runs: all weights at once would take twice
    the memory of a file in half precision, and eight times that of one in 4 bits.
    """
    constant, waiting, ordered = set(weights), dict[str, NodeProto](), list[NodeProto]()

    def place(node: NodeProto) -> None:
        for name in node.input:
            if name in waiting:
                place(waiting.pop(name))
        ordered.append(node)

    for node in nodes:
        if node.input and constant.issuperset(node.input) and len(node.output) == 1:
            constant.add(node.output[0])
            waiting[node.output[0]] = node
        else:
            place(node)
    return [*ordered, *waiting.values()]


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model`, in place, with the shape of each output in its place, int64 [rank]. Each is measured when it is computed."""
    measured, nodes = [value.name for value in model.graph.output], list(model.graph.node)
    del model.graph.node[:], model.graph.output[:]
    for node in nodes:
        model.graph.node.append(node)
        model.graph.node.extend(helper.make_node("Shape", [name], [f"{name}//shape"]) for name in node.output if name in measured)
    outputs = (helper.make_tensor_value_info(f"{name}//shape", TensorProto.INT64, [None]) for name in measured)
    model.graph.output.extend(outputs)
    return model


def _widen_attributes(node: NodeProto) -> None:
    """Make half-precision constants and cast targets float32."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALF:
            wide = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
            attribute.t.CopyFrom(onnx.numpy_helper.from_array(wide, attribute.t.name))


def _cast(source: str, target: str, dtype: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], to=dtype)
