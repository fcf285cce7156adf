"""What is around a weight in an ONNX graph: the products that read it, permutations, and shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir
from onnx_ir import Node, Value

#: The operators between a dequantized weight and its products: they take parts of it.
_PARTS = ("Reshape", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Transpose")


@dataclass(frozen=True, eq=False)
class WeightProduct:
    """One product of a weight."""

    node: Node
    #: The index of the other factor among its inputs.
    other: int


def products(weight: Value) -> Iterator[WeightProduct]:
    """The matrix products and convolutions that read `weight`, or a part of it."""
    for user, index in tuple(weight.uses()):
        if user.op_type == "MatMul":
            yield WeightProduct(user, 1 - index)
        elif user.op_type == "Conv" and index == 1:
            yield WeightProduct(user, 0)
        elif user.op_type in _PARTS and index == 0:
            for part in user.outputs:
                yield from products(part)
        else:
            raise AssertionError(f"{weight.name} is read by input {index} of {user.op_type}")


def undone(value: Value, order: list[int]) -> Value | None:
    """What `value` is without the permutation `order` that computed it. None: another operator computes it."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or permutation(node) != order:
        return None
    return node.inputs[0]


def permutation(node: Node) -> list[int]:
    return list(node.attributes["perm"].as_ints())


def shape_of(value: Value) -> onnx_ir.Shape:
    assert value.shape is not None
    return value.shape


def permuted(shape: onnx_ir.Shape, order: list[int]) -> onnx_ir.Shape:
    return onnx_ir.Shape([shape[axis] for axis in order])
