"""ONNX Runtime's CUDA provider has a kernel for every node, and copies nothing in a graph that it is to capture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper, save

from sana_export.architectures import LATENT_STRIDE
from sana_export.checkpoint.checkpoint import open_checkpoint
from sana_export.contract import GRAPH_GROUPS, GRAPHS
from sana_export.export.example_inputs import graph_spec
from sana_export.export.onnx import export_onnx
from sana_export.graphs.builders import build_graph
from sana_export.graphs.denoiser import LONGEST_AXIS
from sana_export.graphs.storage import WeightFile
from sana_export.manifest import Manifest, Options
from sana_export.numeric import MAX_SIDE
from sana_export.synth.checkpoint import make_checkpoint
from sana_export.synth.recipes import RECIPES
from tests.support.cuda_provider import place

#: It computes the tables of its token positions and its causal mask on the host. It runs once per prompt and is not captured.
COPIES = ("text_encoder",)


def assert_captured(path: Path, graph: str) -> None:
    found = place(path)
    assert found.without_kernel == ()
    assert (found.copies == ()) == (graph not in COPIES), found.copies


@pytest.mark.parametrize("fixture", ["controlnet_bundle", "sprint_bundle"])
def test_float32_graphs(fixture: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(fixture)
    graphs = Manifest.load(bundle).graphs
    assert set(graphs) == set(GRAPHS if fixture == "controlnet_bundle" else GRAPH_GROUPS["default"])
    for name, graph in graphs.items():
        assert_captured(bundle / graph.onnx.path, name)


def exported(checkpoint: Any, name: str, precision: str, folder: Path) -> Path:
    options = Options(precision, clamp=True, pag_layers=(0,))
    with WeightFile(folder / "model.onnx.data") as weights, torch.no_grad():
        module = build_graph(name, checkpoint, options)
        export_onnx(module, graph_spec(name, checkpoint, options), folder / "model.onnx", weights)
    return folder / "model.onnx"


@pytest.mark.parametrize("name", ["text_encoder", "context", "vae_decoder_tail"])
def test_float16_graphs(name: str, tiny_checkpoint: Any, tmp_path: Path) -> None:
    assert_captured(exported(tiny_checkpoint, name, "fp16", tmp_path), name)


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small checkpoint with the position table of the 2K checkpoints. Its waves are too many to count as a small constant."""
    recipe = RECIPES["tiny-random"]
    changes = {"interpolation_scale": 1.0, "sample_size": 64, "num_layers": 1}
    changes |= {"num_attention_heads": 16, "cross_attention_dim": 16 * 32}
    recipe = replace(recipe, transformer={**recipe.transformer, **changes})
    return open_checkpoint(str(make_checkpoint(recipe, tmp_path_factory.mktemp("large") / "checkpoint")))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_denoiser_with_a_position_table(precision: str, large_checkpoint: Any, tmp_path: Path) -> None:
    path = exported(large_checkpoint, "denoiser", precision, tmp_path)
    assert_captured(path, "denoiser")
    assert {"Sin", "Slice"} <= set(place(path).on_device)


def test_the_position_table_covers_every_image() -> None:
    assert LONGEST_AXIS * LATENT_STRIDE >= MAX_SIDE


def write(path: Path, nodes: list[Any], dtype: int = TensorProto.FLOAT) -> Path:
    """A graph from x [n] to y [n]."""
    values = [helper.make_tensor_value_info(name, dtype, ["n"]) for name in "xy"]
    numbers = {"zero": 0, "one": 1}
    constants = [helper.make_tensor(name, TensorProto.INT64, [], [value]) for name, value in numbers.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_a_range_of_a_size_is_copied_to_the_device(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Squeeze", ["shape"], ["size"]),
        helper.make_node("Range", ["zero", "size", "one"], ["range"]),
        helper.make_node("Cast", ["range"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "numbers"], ["y"]),
    ]
    found = place(write(tmp_path / "g.onnx", nodes))
    assert (found.copies, found.on_device) == (("numbers",), ("Shape", "Add"))


def test_sizes_that_stay_sizes_are_not_copied(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "one"], ["target"]),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    found = place(write(tmp_path / "g.onnx", nodes))
    assert (found.copies, found.on_device) == ((), ("Shape", "Reshape"))


@pytest.mark.parametrize(("operator", "dtype"), [("Asin", TensorProto.FLOAT), ("Relu", TensorProto.BFLOAT16)])
def test_a_node_without_a_kernel_is_named_and_its_tensors_are_copied(operator: str, dtype: int, tmp_path: Path) -> None:
    found = place(write(tmp_path / "g.onnx", [helper.make_node(operator, ["x"], ["y"])], dtype))
    assert found.without_kernel == (f"{operator} ({TensorProto.DataType.Name(dtype)})",)
    assert found.copies == ("x", "y")
