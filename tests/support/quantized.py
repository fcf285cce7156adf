"""A small quantized bundle, and an independent reading of its weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from sana_export.export.graph_files import export_graphs
from sana_export.export.text_files import write_text_files
from sana_export.files import file_entry
from sana_export.manifest import Manifest
from tests.support.bundles import made_once

SCHEMES = {"embeddings": "int8-weight", "text_encoder": "int8-weight", "denoiser": "int4-weight"}


def quantized_bundle_in(folder: Path, bundle: Path, checkpoint: Any) -> Path:
    """A copy of `bundle`, of `checkpoint`, in `folder` whose text encoder, denoiser and embedding table are quantized."""

    def make(own: Path) -> None:
        shutil.copytree(bundle, own)
        manifest = Manifest.load(own)
        options = replace(manifest.options, quantize=SCHEMES, quantize_method=("nearest",))
        graphs = dict(manifest.graphs)
        for graph in ("text_encoder", "denoiser"):
            graphs |= export_graphs(graph, [graph], checkpoint, options, own)
        write_text_files(checkpoint, own, quantized=True)
        files = tuple(file_entry(own, own / file.path) for file in manifest.files)
        replace(manifest, options=options, graphs=graphs, files=files).save(own)

    return made_once(folder / f"{bundle.name}-quantized", make)


def read_weights(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name of each dequantized tensor in the ONNX file to its numbers, and to the scale of each number.

    Read by the onnx package and multiplied here, as the specification of DequantizeLinear says.
    """
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:  # of a layer's input
            continue
        values, scales = (numpy_helper.to_array(tensors[name]).astype(np.float64) for name in node.input)
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if block := attributes.get("block_size"):
            assert attributes["axis"] == 0
            each = np.stack([scales[row // block] for row in range(values.shape[0])])
        else:
            each = np.moveaxis(np.moveaxis(np.ones_like(values), attributes["axis"], -1) * scales, -1, attributes["axis"])
        found[node.output[0]] = values * each, each
    return found


def replaced(path: Path, numbers: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The model at `path` with other numbers in some of its initializers."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in numbers:
            kept = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(numbers[tensor.name].astype(kept.dtype).reshape(kept.shape), tensor.name))
    return model
