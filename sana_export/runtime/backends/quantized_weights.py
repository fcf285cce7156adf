"""The numbers that the quantized weights of a bundle stand for, for a backend that does not run its ONNX files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.onnx_weights import read_tensors
from sana_export.formats.quantized import as_used, dequantize, scale_shape, unpack
from sana_export.known_files import check_known_files
from sana_export.manifest import GraphEntry, QuantizedWeight


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A quantized layer of a bundle."""

    #: Its entry in the manifest.
    weight: QuantizedWeight
    #: The numbers that its weight stands for, in the shape in which the graph uses it.
    numbers: Float32
    #: Its other tensors, such as "input.scale", by the end of their names. Each is one row.
    tensors: Mapping[str, Float32]


def read_quantized(
    bundle: Path, graph: GraphEntry, dtype: str, shapes: dict[str, tuple[int, ...]], *, fix: str
) -> Iterator[StoredLayer]:
    """The quantized layers of `graph`. `shapes` has the shape of each weight, by name.

    Scales and other tensors are stored in `dtype`. Raises ArtifactError, with `fix`, for damaged files.
    """
    onnx, *data = check_known_files(bundle, graph.files, fix=fix)
    tensors, kind = read_tensors(onnx, data, fix=fix), WEIGHT_DTYPES[dtype]
    for weight in graph.quantized:
        values = unpack(tensors[f"{weight.name}.quantized"], weight.dtype, weight.shape)
        own = {end: kind.widen(tensors[f"{weight.name}.{end}"].view(kind.numpy)) for end in ("scale", *layer_tensors(weight))}
        scales = own["scale"].reshape(scale_shape(weight.shape, weight.axis, weight.block))
        numbers = dequantize(values, scales, weight.axis, weight.block)
        yield StoredLayer(weight, as_used(numbers, weight.transposed, shapes[weight.name]), own)


def layer_tensors(weight: QuantizedWeight) -> tuple[str, ...]:
    """The ends of the names of the tensors that the layer has besides its weight."""
    present = {
        "input.scale": weight.inputs,
        "input.factor": weight.rescaled,
        "low_rank.down": weight.rank,
        "low_rank.up": weight.rank,
    }
    return tuple(end for end, there in present.items() if there)
