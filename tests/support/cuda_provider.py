"""Where ONNX Runtime's CUDA provider runs the nodes of a graph, and which tensors it copies between host and device.

`KERNELS` is what docs/OperatorKernels.md of ONNX Runtime lists for opset 20, as far as our graphs need it. The rules are those of
`GetCpuPreferredNodes` (onnxruntime/core/framework/fallback_cpu_capability.cc): nodes that compute with sizes alone run on the host.
A graph in which anything is copied is not captured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

_FLOATS = frozenset({TensorProto.FLOAT16, TensorProto.FLOAT})
_NUMBERS = _FLOATS | {TensorProto.INT64}
_ANY = _NUMBERS | {TensorProto.BOOL, TensorProto.UINT8}
#: Constants of at most this many elements may be used on the host.
_SMALL = 100


@dataclass(frozen=True)
class Kernel:
    """An operator's kernel on the device."""

    #: The types that its inputs and outputs on the device may have.
    types: frozenset[int]
    #: The inputs that it reads on the host: shapes, axes, limits.
    on_host: tuple[int, ...] = ()
    #: Whether its output is on the host.
    sizes: bool = False


KERNELS: dict[str, Kernel] = {
    **dict.fromkeys(("Add", "Div", "Mul", "Sub", "Pow"), Kernel(_NUMBERS)),
    **dict.fromkeys(("Cos", "Gelu", "LayerNormalization", "MatMul", "Reciprocal", "Relu", "Round"), Kernel(_FLOATS)),
    **dict.fromkeys(("Conv", "DepthToSpace", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"), Kernel(_FLOATS)),
    **dict.fromkeys(("Cast", "Concat", "Gather", "Transpose"), Kernel(_ANY)),
    **dict.fromkeys(("Expand", "Reshape", "Squeeze", "Unsqueeze", "Split"), Kernel(_ANY, on_host=(1,))),
    **dict.fromkeys(("ReduceMean", "ReduceSum"), Kernel(_FLOATS, on_host=(1,))),
    "Clip": Kernel(_FLOATS, on_host=(1, 2)),
    "Greater": Kernel(_NUMBERS | {TensorProto.BOOL}),
    "Neg": Kernel(_NUMBERS),
    "Pad": Kernel(_FLOATS | {TensorProto.BOOL}, on_host=(1, 2, 3)),
    # It reads its inputs on the device, so a size is first copied there; and it waits for them, which no capture allows.
    "Range": Kernel(frozenset({TensorProto.FLOAT, TensorProto.INT64})),
    "Shape": Kernel(_ANY, sizes=True),
    "Slice": Kernel(_ANY, on_host=(1, 2, 3, 4)),
    "Where": Kernel(_ANY),
}


@dataclass(frozen=True)
class Placement:
    """Where the nodes of a graph run."""

    #: Operators without a kernel for their types, as "Op (types)".
    without_kernel: tuple[str, ...]
    #: Names of the tensors that are copied between host and device.
    copies: tuple[str, ...]
    #: Operators that run on the device.
    on_device: tuple[str, ...]


def place(path: Path) -> Placement:
    """The placement of the ONNX file `path`, whose inputs and outputs are on the device."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), strict_mode=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    host_tensors: set[str] = set()
    host_nodes: list[onnx.NodeProto] = []
    device_nodes: list[onnx.NodeProto] = []
    missing: list[str] = []
    for node in graph.node:  # a node comes after the nodes whose outputs it reads
        kernel = KERNELS.get(node.op_type)
        if kernel is None or not _has_types(node, kernel, types):
            missing.append(f"{node.op_type} ({', '.join(TensorProto.DataType.Name(types[name]) for name in node.input if name)})")
            on_host = True
        else:
            on_host = _prefers_host(node, kernel, types, constants, host_tensors)
        (host_nodes if on_host else device_nodes).append(node)
        if on_host or (kernel is not None and kernel.sizes):
            host_tensors.update(node.output)
    copies = {name for name in host_tensors if name in {output.name for output in graph.output}}
    for node in device_nodes:
        for index, name in enumerate(node.input):
            if name and name not in constants and (name in host_tensors) != (index in KERNELS[node.op_type].on_host):
                copies.add(name)
    for node in host_nodes:
        copies.update(name for name in node.input if name and name not in constants and name not in host_tensors)
    return Placement(tuple(missing), tuple(sorted(copies)), tuple(node.op_type for node in device_nodes))


def _has_types(node: onnx.NodeProto, kernel: Kernel, types: dict[str, int]) -> bool:
    inputs = [types[name] for index, name in enumerate(node.input) if name and index not in kernel.on_host]
    outputs = [] if kernel.sizes else [types[name] for name in node.output]
    return kernel.types.issuperset([*inputs, *outputs])


def _prefers_host(node: onnx.NodeProto, kernel: Kernel, types: dict[str, int], constants: dict[str, int], host: set[str]) -> bool:
    """Whether the node computes with sizes alone: it reads a tensor on the host and nothing but those and small constants."""
    names = [name for name in node.input if name]
    if not host.intersection(names) or any(types[name] == TensorProto.FLOAT16 for name in names):
        return False
    for index, name in enumerate(node.input):
        if not name or constants.get(name, _SMALL + 1) <= _SMALL:
            continue
        if name not in host or index in kernel.on_host:
            return False
    return True
