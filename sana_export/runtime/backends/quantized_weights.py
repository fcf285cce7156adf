"""The quantized weights of a bundle, for a backend that does not run its ONNX files."""

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
    #: The small numbers of its weight, as they are stored: two 4-bit numbers to a byte.
    stored: Bytes
    #: Their scales, in the shape of `formats.quantized.scale_shape`.
    scales: Float32
    #: Its other tensors, such as "input.scale", by the end of their names. Each is one row.
    tensors: Mapping[str, Float32]

    def numbers(self, shape: tuple[int, ...]) -> Float32:
        """The numbers that its weight stands for, in the shape in which the graph uses it."""
        weight = self.weight
        values = unpack(self.stored, weight.dtype, weight.shape)
        return as_used(dequantize(values, self.scales, weight.axis, weight.block), weight.transposed, shape)


def read_quantized(bundle: Path, graph: GraphEntry, dtype: str, *, fix: str) -> Iterator[StoredLayer]:
    """The quantized layers of `graph`, whose precision is `dtype`. Raises ArtifactError, with `fix`, for damaged files."""
    onnx, *data = check_known_files(bundle, graph.files, fix=fix)
    tensors, kind = read_tensors(onnx, data, fix=fix), WEIGHT_DTYPES[dtype]
    for weight in graph.quantized:
        own = {
            end: WEIGHT_DTYPES[own].widen(tensors[weight.tensor_name(end)].view(WEIGHT_DTYPES[own].numpy))
            for end, own in weight.tensors(dtype).items()
            if end not in ("scale", "tensor_scale")
        }
        yield StoredLayer(weight, tensors[f"{weight.name}.quantized"], read_scales(tensors, weight, kind), own)


def read_scales(tensors: Mapping[str, Bytes], weight: QuantizedWeight, dtype: DType) -> Float32:
    """The scales of `weight` in a graph of `dtype`, of whose files `tensors` are the initializers."""
    stored = tensors[f"{weight.name}.scale"]
    if weight.dtype == "fp4":
        tensor_scale = tensors[f"{weight.name}.tensor_scale"].view("<f4")[0]
        scales = widen_block_scales(stored.view(np.int8), tensor_scale, dtype)
    else:
        scales = dtype.widen(stored.view(dtype.numpy))
    return scales.reshape(scale_shape(weight.shape, weight.axis, weight.block))
