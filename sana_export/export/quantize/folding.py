"""Moves the factors of layers' inputs into what is computed before them, where that is exact and smaller than the inputs.

A rescaled layer multiplies its whole input by a factor for each channel (graph.py), which is a pass over the activations. Where
everything between two places is linear in each channel alone, the multiplication commutes with it:

| factor of the inputs of | goes to | because |
|---|---|---|
| out of self-attention | v's output channels in the weight of q, k, v | attention is linear in each channel of v, also perturbed |
| qkv, inverted | scale and shift of the norm before: [C] | n * scale + shift is linear in both |
| out of cross-attention | the values of the text: [L, C] | a weighted sum of tokens is linear in each channel |
| point | weights and bias of the depthwise convolution of the value half | the gate multiplies each channel by another number |

Not moved: the query of cross-attention reads the residual stream, which others read too. The text encoder runs once for a prompt.
The first row is done while the weights are quantized (weights.py), the others in the graph. A layer in another form keeps its
multiplication.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable

import numpy as np
import onnx_ir
from onnx_ir import Node, TensorType, Value

#: A layer's weight -> the weight before it whose last output channels take the layer's factors.
INTO_WEIGHTS = {r"(blocks\.\d+)\.out\.weight": r"\1.qkv"}


def weight_before(name: str, quantized: Collection[str]) -> str | None:
    """The weight of `quantized` whose last output channels take the factors of the layer with the weight `name`. None: none does.

    A weight that is not quantized stays as it is in the checkpoint, because a LoRA may change it.
    """
    for pattern, before in INTO_WEIGHTS.items():
        if (match := re.fullmatch(pattern, name)) is not None and (found := match.expand(before)) in quantized:
            return found
    return None


def fold_factors(graph: onnx_ir.Graph, names: Iterable[str]) -> None:
    """Move the factors of the layers with the weights `names`, where `insert_dequantize` put them, by the folds of `FOLDS`."""
    for name in names:
        factor = graph.initializers.get(f"{name}.input.factor")
        fold = next((fold for pattern, fold in FOLDS.items() if re.fullmatch(pattern, name)), None)
        if factor is not None and fold is not None:
            for product, _ in tuple(factor.uses()):
                fold(graph, product, factor)


def into_norm(graph: onnx_ir.Graph, product: Node, factor: Value) -> None:
    """(norm(x) * scale + shift) * factor = norm(x) * (scale * factor) + shift * factor.

    Requires that all readers of the norm multiply it by the same factors.
    """
    products = [node for node, _ in product.inputs[0].uses()] if product.inputs[0] else []
    norm = _norm_before(product.inputs[0], -len(_sizes(factor)))
    if norm is None or not all(_multiplies(node, factor) for node in products):
        return
    # The factors of all products are equal. Both ends are used, because a file keeps only initializers that are read.
    for index, own in ((1, products[0].inputs[1]), (2, products[-1].inputs[1])):
        _multiply_input(graph, norm, index, own, [_count(factor)])
    for node in products:
        _remove(graph, node)


def into_values(graph: onnx_ir.Graph, product: Node, factor: Value) -> None:
    """(weights @ values) * factor = weights @ (values * factor), for values [R, heads, L, dim] and heads * dim factors."""
    heads = _sole_producer(product.inputs[0], "Reshape")
    swap = None if heads is None else _sole_producer(heads.inputs[0], "Transpose")
    attention = None if swap is None else _sole_producer(swap.inputs[0], "MatMul")
    if swap is None or attention is None or _permutation(swap) != [0, 2, 1, 3]:
        return
    count, dim = onnx_ir.Shape(_sizes(swap.outputs[0])[-2:]).numpy()
    _multiply_input(graph, attention, 1, factor, [count, 1, dim])
    _remove(graph, product)


def into_depthwise(graph: onnx_ir.Graph, product: Node, factor: Value) -> None:
    """(conv(x) * gate) * factor = conv'(x) * gate, where conv' has the depthwise conv's weights and bias times the factors.

    Between the gate and the factors the channels may be moved to the end, as a matrix product reads them.
    """
    value, axis = product.inputs[0], -len(_sizes(factor))
    if (moved := _sole_producer(value, "Transpose")) is not None:
        value, axis = moved.inputs[0], _permutation(moved)[axis] - len(_permutation(moved))
    gated = _sole_producer(value, "Mul") if axis == -3 else None
    halves = () if gated is None else gated.inputs
    conv = next((node for node in (_sole_producer(half, "Conv") for half in halves) if node is not None), None)
    if conv is None or conv.attributes["group"].as_int() != _count(factor) or len(conv.inputs) != 3:
        return
    _multiply_input(graph, conv, 1, factor, [_count(factor), 1, 1, 1])
    _multiply_input(graph, conv, 2, factor, [_count(factor)])
    _remove(graph, product)


#: The weight of a layer -> the fold of its factors.
FOLDS: dict[str, Callable[[onnx_ir.Graph, Node, Value], None]] = {
    r"blocks\.\d+\.(qkv|halves\.(value|gate)\.inverted\.weight)": into_norm,
    r"blocks\.\d+\.cross_out\.weight": into_values,
    r"blocks\.\d+\.point\.weight": into_depthwise,
}


def _norm_before(value: Value | None, axis: int) -> Node | None:
    """The norm that computes `value`, with its channels on `axis`, if nodes between them only move numbers, for no other reader."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        given, moved = node.inputs[0], node.outputs[0]
        assert given is not None
        if node.op_type == "Transpose":
            axis = _permutation(node)[axis] - len(_permutation(node))
        elif axis != -1 or _sizes(given)[-1] != _sizes(moved)[-1]:
            return None
        node = given.producer() if len(given.uses()) == 1 else None
    return node if node is not None and node.op_type == "LayerNormalization" and axis == -1 else None


def _multiplies(node: Node, factor: Value) -> bool:
    """Whether `node` multiplies by the same numbers as `factor`."""
    own = node.inputs[1].const_value if node.op_type == "Mul" and node.inputs[1] is not None else None
    return own is not None and factor.const_value is not None and np.array_equal(own.numpy(), factor.const_value.numpy())


def _sole_producer(value: Value | None, kind: str) -> Node | None:
    """The node of `kind` that computes `value` for one reader alone."""
    node = None if value is None else value.producer()
    return node if value is not None and node is not None and node.op_type == kind and len(value.uses()) == 1 else None


def _multiply_input(graph: onnx_ir.Graph, node: Node, index: int, factor: Value | None, shape: list[int]) -> None:
    """Multiply input `index` of `node` by `factor` in `shape`."""
    given = node.inputs[index]
    assert given is not None
    assert factor is not None
    name = f"{given.name}.{factor.name}"
    if len(shape) != len(_sizes(factor)):
        sizes = onnx_ir.tensor(np.array(shape, np.int64), name=f"{name}.shape")
        constant = Value(name=sizes.name, type=TensorType(sizes.dtype), shape=onnx_ir.Shape([len(shape)]), const_value=sizes)
        graph.register_initializer(constant)
        factor = _inserted(graph, node, "Reshape", [factor, constant], f"{name}.reshaped", onnx_ir.Shape(shape))
    node.replace_input_with(index, _inserted(graph, node, "Mul", [given, factor], name, onnx_ir.Shape(_sizes(given))))


def _inserted(graph: onnx_ir.Graph, before: Node, kind: str, inputs: list[Value], name: str, shape: onnx_ir.Shape) -> Value:
    """The output of a new node before another one. Both have the same name."""
    node = onnx_ir.node(kind, inputs, name=name)
    (out,) = node.outputs
    out.name, out.type, out.shape = name, inputs[0].type, shape
    graph.insert_before(before, node)
    return out


def _remove(graph: onnx_ir.Graph, product: Node) -> None:
    """Remove a multiplication: what reads it reads its first factor."""
    assert product.inputs[0] is not None
    product.outputs[0].replace_all_uses_with(product.inputs[0])
    graph.remove(product, safe=True)


def _permutation(node: Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def _sizes(value: Value) -> tuple[int | onnx_ir.SymbolicDim, ...]:
    assert value.shape is not None
    return value.shape.dims


def _count(factor: Value) -> int:
    """How many factors there are."""
    assert factor.const_value is not None
    return factor.const_value.size
