"""Factors that move into what is before a layer: the graph computes the same, and its large tensor is not multiplied any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from sana_export.export.example_inputs import CHECK_SIZES, graph_spec, random_inputs
from sana_export.export.quantize.folding import fold_factors, weight_before
from sana_export.graphs.builders import build_graph
from sana_export.manifest import Options

VALUE, GATE = "blocks.0.halves.value.inverted.weight", "blocks.0.halves.gate.inverted.weight"
CROSS_OUT, POINT = "blocks.0.cross_out.weight", "blocks.0.point.weight"
RNG = np.random.default_rng(0)
FACTORS = RNG.uniform(0.1, 10, 8).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def layer(given: str, name: str, out: str) -> list[NodeProto]:
    """As insert_dequantize leaves a layer: its whole input times the factors, and the product, for which any node stands."""
    product = helper.make_node("Mul", [given, f"{name}.input.factor"], [f"{out}.multiplied"])
    return [product, helper.make_node("Neg", [f"{out}.multiplied"], [out])]


@dataclass
class Case:
    """The nodes before some layers. The outputs are what the layers read."""

    nodes: list[NodeProto]
    inputs: dict[str, np.ndarray]
    constants: dict[str, np.ndarray]
    outputs: list[str] = field(default_factory=lambda: ["y"])

    def model(self) -> onnx.ModelProto:
        described = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in self.inputs.items()]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        constants = [numpy_helper.from_array(value, name) for name, value in self.constants.items()]
        graph = helper.make_graph(self.nodes, "case", described, outputs, constants)
        opset = helper.make_opsetid("", 20)
        return shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[opset]), data_prop=True)

    def folded(self) -> onnx.ModelProto:
        model = onnx_ir.from_proto(self.model())
        layers = [name.removesuffix(".input.factor") for name in self.constants if name.endswith(".input.factor")]
        fold_factors(model.graph, layers)
        return onnx_ir.to_proto(model)

    def run(self, model: onnx.ModelProto) -> list[np.ndarray]:
        onnx.checker.check_model(model)
        return ReferenceEvaluator(model).run(None, self.inputs)


def norm(*, channels_first: bool = False, gate_factors: np.ndarray = FACTORS) -> Case:
    """The two halves of a feed-forward block, which read one norm."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale", "shift"], ["modulated"], axis=-1),
        helper.make_node("Reshape", ["modulated", "sizes"], ["pixels"]),
        helper.make_node("Transpose", ["pixels"], ["channels"], perm=[0, 3, 1, 2]),
    ]
    given, shape = ("channels", (8, 1, 1)) if channels_first else ("pixels", (8,))
    nodes = [*(nodes if channels_first else nodes[:2]), *layer(given, VALUE, "y"), *layer(given, GATE, "z")]
    factors = {f"{VALUE}.input.factor": FACTORS.reshape(shape), f"{GATE}.input.factor": gate_factors.reshape(shape)}
    inputs = {"x": normal(2, 6, 8), "scale": normal(8), "shift": normal(8)}
    return Case(nodes, inputs, {"sizes": np.array([2, 2, 3, 8]), **factors}, ["y", "z"])


def values() -> Case:
    """The weighted sum of the values of the text."""
    nodes = [
        helper.make_node("MatMul", ["weights", "values"], ["attended"]),
        helper.make_node("Transpose", ["attended"], ["tokens"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["tokens", "sizes"], ["joined"]),
        *layer("joined", CROSS_OUT, "y"),
    ]
    inputs = {"weights": np.abs(normal(2, 2, 6, 3)), "values": normal(2, 2, 3, 4)}
    return Case(nodes, inputs, {"sizes": np.array([2, 6, 8]), f"{CROSS_OUT}.input.factor": FACTORS})


def depthwise(*, order: Sequence[int] = ()) -> Case:
    """A gated depthwise convolution. The gate comes first here, so the fold has to find the other half.

    With an `order` of axes, the layer reads the last one of the transposed value.
    """
    nodes = [
        helper.make_node("Conv", ["x", "kernel", "bias"], ["value"], group=8, pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["x"], ["sigmoid"]),
        helper.make_node("Mul", ["x", "sigmoid"], ["silu"]),
        helper.make_node("Mul", ["silu", "value"], ["gated"]),
        *([helper.make_node("Transpose", ["gated"], ["pixels"], perm=order)] if order else []),
        *layer("pixels" if order else "gated", POINT, "y"),
    ]
    factors = FACTORS if order else FACTORS.reshape(8, 1, 1)
    constants = {"kernel": normal(8, 1, 3, 3), "bias": normal(8), f"{POINT}.input.factor": factors}
    return Case(nodes, {"x": normal(2, 8, 8, 8)}, constants)


CASES = {
    "norm": norm(),
    "norm, channels first": norm(channels_first=True),
    "values": values(),
    "depthwise": depthwise(),
    "depthwise, channels last": depthwise(order=(0, 2, 3, 1)),
}
#: What the factors multiply after the fold.
SMALL = {
    "norm": {"scale", "shift"},
    "norm, channels first": {"scale", "shift"},
    "values": {"values"},
    "depthwise": {"kernel", "bias"},
    "depthwise, channels last": {"kernel", "bias"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_fold_computes_the_same_with_small_products(name: str) -> None:
    case = CASES[name]
    folded = case.folded()
    for found, wanted in zip(case.run(folded), case.run(case.model()), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    factors = {name for name in case.constants if name.endswith(".input.factor")}
    nodes = folded.graph.node
    assert factors <= {read for node in nodes for read in node.input}, (
        "a file keeps only what is read; the torch backend reads them"
    )
    factors |= {node.output[0] for node in nodes if node.op_type == "Reshape" and node.input[0] in factors}
    assert {node.input[0] for node in nodes if node.op_type == "Mul" and node.input[1] in factors} == SMALL[name]


def other_reader(case: Case, of: str) -> Case:
    """`case` with another node that reads a tensor."""
    return Case([*case.nodes, helper.make_node("Neg", [of], ["other"])], case.inputs, case.constants, [*case.outputs, "other"])


KEPT = {
    "another layer reads the norm": other_reader(norm(), "modulated"),
    "another layer reads the pixels": other_reader(norm(), "pixels"),
    "other factors": norm(gate_factors=FACTORS[::-1].copy()),
    "another layer reads the attention": other_reader(values(), "attended"),
    "another layer reads the convolution": other_reader(depthwise(), "value"),
    "another layer reads the pixels of the convolution": other_reader(depthwise(order=(0, 2, 3, 1)), "pixels"),
    "the factors are for columns": depthwise(order=(0, 1, 2, 3)),
}


@pytest.mark.parametrize("name", KEPT)
def test_without_its_precondition_nothing_moves(name: str) -> None:
    case = KEPT[name]
    assert [node.op_type for node in case.folded().graph.node] == [node.op_type for node in case.nodes]
    for found, wanted in zip(case.run(case.folded()), case.run(case.model()), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_factors_move_only_into_quantized_weights() -> None:
    """Any other weight may be changed by a LoRA at run time."""
    assert weight_before("blocks.11.out.weight", {"blocks.11.qkv", "blocks.1.qkv"}) == "blocks.11.qkv"
    assert weight_before("blocks.11.out.weight", {"blocks.1.qkv"}) is None
    assert weight_before("blocks.11.cross_out.weight", {"blocks.11.qkv"}) is None
    assert weight_before("stages.1.attention.out.weight", {"stages.1.attention.qkv"}) is None


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 4e-3)])
def test_attention_is_linear_in_each_channel_of_v(tiny_checkpoint: Any, precision: str, limit: float) -> None:
    """With v's channels times factors and the inputs of `out` divided by them nothing changes, also in the perturbed branch."""
    options = Options(precision, True, (1,))
    module = build_graph("denoiser", tiny_checkpoint, options)
    inputs = random_inputs(graph_spec("denoiser", tiny_checkpoint, options), CHECK_SIZES, seed=3)
    inputs |= {"perturbed": torch.tensor([0.0, 1.0]), "source": torch.tensor([0, 0])}
    with torch.no_grad():
        wanted = module(**inputs)
        for block in module.blocks:  # type: ignore[union-attr]
            channels = block.out.weight.shape[0]
            factor = torch.from_numpy(np.exp2(RNG.integers(-3, 3, channels)).astype(np.float32))
            block.qkv[-channels:] *= factor[:, None]
            block.out.weight /= factor[:, None]
        found = module(**inputs)
    assert (wanted[0] != wanted[1]).any()
    assert torch.linalg.norm(found - wanted) <= limit * torch.linalg.norm(wanted)
