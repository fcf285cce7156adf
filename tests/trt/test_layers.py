"""The list of layers that a builder logs: read from text, and from a real build of a graph whose layers are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sana_export.contract import GraphSpec, TensorSpec
from sana_export.errors import ArtifactError, UsageError
from sana_export.profiles import Range, profile_named
from sana_export.trt.build import build_engine
from sana_export.trt.bundle import list_layers, plan_bundle
from sana_export.trt.flavour import load
from sana_export.trt.layers import EngineLayer, LayerTensor, parse_layers

LISTED = """Layers:
Name: entry^bb^signal^2_myl0_0, LayerType: signal, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, EventId: 10, Metadata: 
Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: [ { Name: n, Location: Device, Dimensions: [1] }], x
Name: __myl_Tran_myl0_1, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [2,-1,8], Strides: [-1,8,1], StrideOrder: [2,1,0], \
Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: y, Dimensions: [2,8,4], Strides: [32,4,0], \
StrideOrder: [2,1,0], Datatype: Float, Format: (Transposed) Transposed format }], TacticName: t, StreamId: 0, Metadata: \
[ONNX Layer: a][ONNX Layer: b]

I/O Tensors:
 Name: x, IOMode: Input
"""  # noqa: E501


def test_kernels_are_read_with_their_tensors() -> None:
    (layer,) = parse_layers(LISTED)
    x = LayerTensor("x", (2, -1, 8), (-1, 8, 1), "Half", "Linear")
    y = LayerTensor("y", (2, 8, 4), (32, 4, 0), "Float", "Transposed")
    assert layer == EngineLayer("__myl_Tran_myl0_1", "kgen", (x,), (), (y,), ("a", "b"))
    assert (x.bytes, y.bytes) == (None, 2 * 8 * 4)  # one size is not fixed; an axis with stride 0 has one number


def test_another_form_is_refused() -> None:
    with pytest.raises(ArtifactError, match="list of layers cannot be read"):
        parse_layers("Layers:\nLayer(Myelin): {ForeignNode[x...y]}, Tactic: 0x1\n\n")


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, GraphSpec]:
    """relu(x w + b) transposed, with x [n, 64] and w [64, 32] in float16."""
    spec = GraphSpec("chain", (TensorSpec("x", "float16", ("batch", 64)),), (TensorSpec("z", "float16", (32, "batch")),))
    ends = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT16, t.shape) for t in (*spec.inputs, *spec.outputs)]
    weights = [numpy_helper.from_array(np.ones(shape, np.float16), name) for name, shape in (("w", (64, 32)), ("b", (32,)))]
    steps = (("MatMul", ["x", "w"], "p"), ("Add", ["p", "b"], "q"), ("Relu", ["q"], "r"), ("Transpose", ["r"], "z"))
    nodes = [helper.make_node(operator, inputs, [output], name=f"the_{operator}") for operator, inputs, output in steps]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "chain.onnx")
    return tmp_path / "chain.onnx", spec


@pytest.mark.parametrize("size", [(16, 16, 16), (1, 16, 32)], ids=["one size", "a range"])
def test_a_real_build_lists_every_node(size: Range, chain: tuple[Path, GraphSpec], tmp_path: Path) -> None:
    path, spec = chain
    module = load("tensorrt-rtx")
    built = build_engine(module, path, tmp_path / "engine", spec, {"batch": size}, list_layers=True)
    layers = parse_layers(built.layers)
    assert {node for layer in layers for node in layer.nodes} == {"the_MatMul", "the_Add", "the_Relu", "the_Transpose"}
    (weight,) = (tensor for layer in layers for tensor in layer.constants if (tensor.bytes or 0) >= 2 * 64 * 32)
    assert weight.bytes == 2 * 64 * 32
    first = next(tensor for layer in layers for tensor in layer.inputs if tensor.name == "x")
    assert (first.shape, first.bytes) == (((16, 64), 2 * 16 * 64) if size[0] == size[2] else ((-1, 64), None))


def test_nobody_gets_a_list_without_asking(chain: tuple[Path, GraphSpec], tmp_path: Path) -> None:
    path, spec = chain
    assert build_engine(load("tensorrt-rtx"), path, tmp_path / "engine", spec, {"batch": (16, 16, 16)}).layers == ""


def test_a_bundle_lists_layers_and_keeps_nothing(tiny_bundle: Path) -> None:
    before = sorted(path.name for path in tiny_bundle.rglob("*"))
    (planned,) = plan_bundle(tiny_bundle, backend="tensorrt-rtx", profile=profile_named("static"), graphs=("sampler",))
    layers = list_layers(tiny_bundle, planned, planned.spec.ranges)
    assert any(tensor.name == "next_latents" for layer in layers for tensor in layer.outputs)
    assert sorted(path.name for path in tiny_bundle.rglob("*")) == before


def test_only_tensorrt_rtx_lists_layers(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (planned,) = plan_bundle(tiny_bundle, backend="tensorrt-rtx", profile=profile_named("static"), graphs=("sampler",))
    other = dataclasses.replace(planned, spec=dataclasses.replace(planned.spec, backend="tensorrt"))
    with pytest.raises(UsageError, match="for TensorRT-RTX only"):
        list_layers(tiny_bundle, other, planned.spec.ranges)
