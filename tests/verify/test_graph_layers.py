"""Tensors belong to the layer whose weights were last used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sana_export.records import LoraTarget
from sana_export.verify.graph_file import GraphFile, open_graph
from sana_export.verify.graph_layers import tensor_origins
from sana_export.verify.reproducer import layer_borders
from tests.support.quantized import quantized_bundle_in


def test_origins() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "blocks.0.query.weight"], ["b"]),
        helper.make_node("Add", ["b", "blocks.0.query.bias"], ["c"]),
        helper.make_node("Shape", ["c"], ["s"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "blocks.12.halves.gate.weight"], ["e"]),
        helper.make_node("Add", ["e", "a"], ["f"]),
        helper.make_node("Mul", ["f", "constant"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(np.ones(size, np.float32), name)
        for name, size in (
            ("blocks.0.query.weight", (4, 4)),
            ("blocks.0.query.bias", (4,)),
            ("blocks.12.halves.gate.weight", (4, 4)),
            ("constant", ()),
        )
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights))
    target = LoraTarget("transformer_blocks.0.attn2.to_q", (4, 4), "blocks.0.query.weight", (4, 4), "float32")
    found = {item.tensor: item for item in tensor_origins(onnx.shape_inference.infer_shapes(model), [target])}
    assert list(found) == list("abcdefy"), "s is not a float"
    assert {name: item.layer for name, item in found.items()} == {
        **{"a": None, "b": "blocks.0", "c": "blocks.0", "d": "blocks.0"},
        **{"e": "blocks.12", "f": "blocks.12", "y": "blocks.12"},
    }
    assert [found[name].place for name in "abdfy"] == [
        "before blocks.0.query",
        "blocks.0.query (diffusers: transformer_blocks.0.attn2.to_q)",
        "after blocks.0.query, before blocks.12.halves.gate",
        "after blocks.12.halves.gate",
        "after blocks.12.halves.gate",
    ]
    assert (found["a"].node, found["a"].operator, found["a"].dtype) == ("first", "Neg", "float32")


def products(file: GraphFile) -> list[tuple[str | None, str | None]]:
    """Layer and module of each node that multiplies with a weight, in the order of the file."""
    kinds = ("MatMul", "Conv", "Gemm")
    return [(item.layer, item.module) for item in tensor_origins(file.model) if item.operator in kinds and item.module]


def test_quantized_weights_belong_to_the_nodes_that_read_them(tiny_bundle: Path, tiny_checkpoint: Any, build_cache: Path) -> None:
    """Its text encoder has matrices in 8 bits, its denoiser in 4, transposed and with other shapes."""
    quantized = quantized_bundle_in(build_cache, tiny_bundle, tiny_checkpoint)
    for graph, module in (("text_encoder", "layers.1.qkv"), ("denoiser", "blocks.1.point")):
        file, whole = open_graph(quantized, graph), open_graph(tiny_bundle, graph)
        assert file.entry.quantized
        assert products(file) == products(whole)
        assert (module.rpartition(".")[0], module) in products(file)
        origins = {item.tensor: item for item in tensor_origins(file.model)}
        tensor = next(name for name, item in origins.items() if item.module == module and item.operator in ("MatMul", "Conv"))
        layer = str(origins[tensor].layer)
        borders = layer_borders(file.model, origins, tensor)
        assert borders
        assert not any(name.startswith(layer) for name in borders), "the layer's own weights do not enter it"
