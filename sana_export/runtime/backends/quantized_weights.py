"""The numbers that the quantized weights of a bundle stand for, for a backend that does not run its ONNX files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.onnx_weights import read_tensors
from sana_export.formats.quantized import as_used, dequantize, scale_shape, unpack
from sana_export.known_files import check_known_files
from sana_export.manifest import GraphEntry


def read_quantized(
    bundle: Path, graph: GraphEntry, dtype: str, shapes: dict[str, tuple[int, ...]], *, fix: str
) -> Iterator[tuple[str, Float32]]:
    """The name of each quantized weight of `graph`, and its numbers in the shape that `shapes` has for it.

    Its scales are stored in `dtype`. Raises ArtifactError, with `fix`, for damaged files.
    """
    onnx, *data = check_known_files(bundle, graph.files, fix=fix)
    tensors = read_tensors(onnx, data, fix=fix)
    for weight in graph.quantized:
        values = unpack(tensors[f"{weight.name}.quantized"], weight.dtype, weight.shape)
        stored = tensors[f"{weight.name}.scale"].view(WEIGHT_DTYPES[dtype].numpy)
        scales = WEIGHT_DTYPES[dtype].widen(stored).reshape(scale_shape(weight.shape, weight.axis, weight.block))
        numbers = dequantize(values, scales, weight.axis, weight.block)
        yield weight.name, as_used(numbers, weight.transposed, shapes[weight.name])
