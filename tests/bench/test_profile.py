"""The slowest layers of files and modules for which they are known."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sana_export.bench.profile.onnxruntime import layers, node_layers
from sana_export.bench.profile.profile import BackendProfile, GraphProfile, GraphRun, LayerTime, run_profile
from sana_export.bench.workload import Workload
from sana_export.contract import GraphSpec
from sana_export.manifest import Manifest

WORK = Workload("test", 64, 96, 2, 4.5, ("a cute 🐼",), threads=1)


def test_the_heavy_node_comes_first(tiny_bundle: Path, tmp_path: Path) -> None:
    """A graph with a large product and a small addition."""
    side = 600
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in ("x", "z")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="heavy"), helper.make_node("Add", ["y", "y"], ["z"], name="light")]
    weights = [numpy_helper.from_array(np.ones((side, side), np.float32), "w")]
    graph = helper.make_graph(nodes, "made", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "made.onnx")
    manifest = Manifest.load(tiny_bundle)
    entry = manifest.graphs["context"]
    file = dataclasses.replace(entry.files[0], path="made.onnx")
    made = dataclasses.replace(manifest, graphs={"made": dataclasses.replace(entry, onnx=file, data=())})
    spec, inputs = GraphSpec("made", (), ()), {"x": torch.ones(side, side)}
    found = layers(GraphRun("onnxruntime", tmp_path, made, None, "made", spec, inputs, 1, 3))  # type: ignore[arg-type]
    by_name = {layer.name: layer for layer in found}
    assert by_name["heavy"].operator == "MatMul"
    assert by_name["heavy"].ms > 2 * by_name["light"].ms > 0
    assert by_name["light"].bytes == pytest.approx(3 * 4 * side * side, rel=0.5)


def test_a_node_s_time_is_the_median_of_its_counted_runs() -> None:
    arguments = {"op_name": "Conv", "activation_size": "10", "parameter_size": "20", "output_size": "30"}
    events = [{"cat": "Node", "name": "a_kernel_time", "dur": dur, "args": arguments} for dur in (9000, 1000, 3000, 2000)]
    (layer,) = node_layers([*events, {"cat": "Session", "name": "model_run", "dur": 1}], runs=3)
    assert layer == LayerTime("a", "Conv", 2.0, 60)
    assert layer.gbs == pytest.approx(60 / 2e-3 / 1e9)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_every_graph_of_a_call_is_profiled(backend: str, tiny_bundle: Path, tiny_checkpoint: Any) -> None:
    found = run_profile(tiny_bundle, tiny_checkpoint, backend=backend, workload=WORK, runs=2)
    assert {graph.graph: graph.times for graph in found.graphs} == {
        **{"text_encoder": 1, "context": 1, "denoiser": 2, "sampler": 2, "vae_decoder": 1, "postprocess": 1}
    }
    assert not found.failed
    denoiser = next(graph for graph in found.graphs if graph.graph == "denoiser")
    operators = Counter(layer.operator for layer in denoiser.layers)
    convolution = {"onnxruntime": "Conv", "torch": "aten::mkldnn_convolution"}[backend]
    assert operators[convolution] >= (9 if backend == "onnxruntime" else 1)  # three per block, three blocks
    assert sum(denoiser.operators().values()) == pytest.approx(denoiser.ms)


def test_the_table_shows_the_slowest_and_what_failed() -> None:
    slow, fast = LayerTime("slow", "Conv", 3.0, 6_000_000), LayerTime("fast", "Add", 1.0)
    graphs = (GraphProfile("denoiser", 20, (slow, fast)), GraphProfile("context", 1, (), "no engine"))
    text = BackendProfile("tensorrt", "laptop", 2, graphs).as_text(top=1)
    assert "| denoiser | slow | Conv | 3.000 | 75.0% | 2.0 |" in text
    assert "fast |" not in text
    assert "| denoiser | 20 | 4.000 | Conv 75%, Add 25% |" in text
    assert "| context | 1 | 0.000 | no engine |" in text
