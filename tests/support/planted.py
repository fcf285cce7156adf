"""Faults planted in a bundle, which is sealed again so that nothing but the values tells."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sana_export.export.graph_files import export_graphs
from sana_export.files import file_entry
from sana_export.formats.dtypes import DTYPES
from sana_export.manifest import Manifest


def with_half_denoiser(bundle: Path, checkpoint: Any, folder: Path) -> Path:
    """A copy of a float32 bundle whose denoiser is in float16. Its other graphs read and write float32."""
    shutil.copytree(bundle, folder)
    manifest = Manifest.load(folder)
    options = replace(manifest.options, precision="fp16")
    graphs = export_graphs("denoiser", ["denoiser"], checkpoint, options, folder)
    replace(manifest, options=options, graphs={**manifest.graphs, **graphs}).save(folder)
    return folder


def scale_weight(bundle: Path, graph: str, initializer: str, factor: float) -> None:
    """Multiply one external weight of a graph by `factor`."""
    manifest = Manifest.load(bundle)
    entry = manifest.graphs[graph]
    model = onnx.load(bundle / entry.onnx.path, load_external_data=False)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == initializer)
    where = {item.key: item.value for item in tensor.external_data}
    (dtype,) = (dtype for dtype in DTYPES.values() if dtype.onnx == tensor.data_type)
    path = (bundle / entry.onnx.path).parent / where["location"]
    values = np.memmap(path, dtype.numpy, "r+", int(where["offset"]), tuple(tensor.dims))
    values[:] = dtype.round(dtype.widen(values) * np.float32(factor))
    values.flush()
    changed = file_entry(bundle, path)
    graphs = {  # several graphs may read the file
        name: replace(other, data=tuple(changed if file.path == changed.path else file for file in other.data))
        for name, other in manifest.graphs.items()
    }
    replace(manifest, graphs=graphs).save(bundle)
