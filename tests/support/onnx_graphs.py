"""What an ONNX graph computes, whatever its nodes and intermediate values are called."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import onnx_ir


def nodes(model: onnx_ir.Model) -> tuple[Counter[str], list[str]]:
    """A digest of what every node computes from the graph's inputs and initializers, with its count, and those of the outputs."""
    known: dict[Any, str] = {None: ""}
    for index, value in enumerate(model.graph.inputs):
        known[value] = f"input {index} {value.shape}"
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        known[value] = digest(value.const_value.numpy().tobytes(), value.dtype, value.shape)
    for node in model.graph:
        attributes = sorted((name, str(attribute.value)) for name, attribute in node.attributes.items())
        computed = digest(node.op_type, [known[value] for value in node.inputs], attributes)
        known |= {value: digest(computed, index, value.dtype) for index, value in enumerate(node.outputs)}
    return Counter(known[node.outputs[0]] for node in model.graph), [known[value] for value in model.graph.outputs]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
