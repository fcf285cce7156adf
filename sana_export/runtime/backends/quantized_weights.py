"""The numbers that the quantized weights of a bundle stand for, for a backend that does not run its ONNX files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sana_export.formats.arrays import Bytes, Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES, DType
from sana_export.formats.onnx_weights import read_tensors
from sana_export.formats.quantized import as_used, dequantize, scale_shape, unpack, widen_block_scales
from sana_export.known_files import check_known_files
from sana_export.manifest import GraphEntry, QuantizedWeight


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A quantized layer of a bundle."""

    #: Its entry in the manifest.
    weight: QuantizedWeight
    #: The numbers that its weight stands for, in the shape in which the graph uses it.
    numbers: Float32
    #: Its other tensors but the scales of its weight, such as "input.scale", by the end of their names. Each is one row.
    tensors: Mapping[str, Float32]


def read_quantized(
    bundle: Path, graph: GraphEntry, dtype: str, shapes: dict[str, tuple[int, ...]], *, fix: str
) -> Iterator[StoredLayer]:
    """The quantized layers of `graph`. `shapes` has the shape of each weight, by name.

    `dtype` is the graph's. Raises ArtifactError, with `fix`, for damaged files.
    """
    onnx, *data = check_known_files(bundle, graph.files, fix=fix)
    tensors, kind = read_tensors(onnx, data, fix=fix), WEIGHT_DTYPES[dtype]
    for weight in graph.quantized:
        values = unpack(tensors[f"{weight.name}.quantized"], weight.dtype, weight.shape)
        scales = read_scales(tensors, weight, kind)
        numbers = dequantize(values, scales, weight.axis, weight.block)
        own = {
            end: WEIGHT_DTYPES[own].widen(tensors[weight.tensor_name(end)].view(WEIGHT_DTYPES[own].numpy))
            for end, own in weight.tensors(dtype).items()
            if end not in ("scale", "tensor_scale")
        }
        yield StoredLayer(weight, as_used(numbers, weight.transposed, shapes[weight.name]), own)


def read_scales(tensors: Mapping[str, Bytes], weight: QuantizedWeight, dtype: DType) -> Float32:
    """The scales of `weight` in a graph of `dtype`, of whose files `tensors` are the initializers."""
    stored = tensors[f"{weight.name}.scale"]
    if weight.dtype == "fp4":
        tensor_scale = tensors[f"{weight.name}.tensor_scale"].view("<f4")[0]
        scales = widen_block_scales(stored.view(np.int8), tensor_scale, dtype)
    else:
        scales = dtype.widen(stored.view(dtype.numpy))
    return scales.reshape(scale_shape(weight.shape, weight.axis, weight.block))
