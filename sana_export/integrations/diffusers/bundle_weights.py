"""Rows of a bundle's weights as numbers, and how far each may be from the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sana_export.commands import repair_command
from sana_export.formats.arrays import Float32
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.onnx_weights import read_tensors
from sana_export.formats.quantized import dequantize, spread, unpack
from sana_export.known_files import check_known_files
from sana_export.records import QuantizedWeight
from sana_export.runtime.backends.quantized_weights import read_scales
from sana_export.runtime.pipeline import SanaRuntime


class BundleWeights:
    """The weights of one graph in the bundle, memory-mapped."""

    def __init__(self, runtime: SanaRuntime, graph: str) -> None:
        entry, fix = runtime.manifest.graphs[graph], repair_command(runtime.bundle, runtime.manifest)
        onnx, *data = check_known_files(runtime.bundle, entry.files, fix=fix)
        self._tensors = read_tensors(onnx, data, fix=fix)
        self._quantized = {weight.name: weight for weight in entry.quantized}
        self._dtype = WEIGHT_DTYPES[runtime.manifest.options.dtype]

    def size(self, name: str) -> int:
        """Count of the numbers of a weight; 0 if the graph has none of this name."""
        if (weight := self._quantized.get(name)) is not None:
            return int(np.prod(weight.shape))
        return len(self._tensors[name]) // self._dtype.bytes if name in self._tensors else 0

    def rows(
        self, name: str, shape: tuple[int, ...], rows: Sequence[int], *, dtype: str | None = None, transposed: bool = False
    ) -> tuple[Float32, Float32]:
        """Rows [k, n] of the weight `name` of `shape`, and how far each number may be from the checkpoint's.

        dtype: what it is stored in if it is not quantized. None: the bundle's dtype. transposed: columns instead of rows.
        The distance is half a step of a quantized weight, infinite if its numbers are not the nearest ones, and 0 for others.
        """
        if (weight := self._quantized.get(name)) is not None:
            numbers, steps = self._dequantized(weight, list(rows), columns=transposed or weight.transposed)
            return numbers, steps * np.float32(0.5 if weight.nearest else np.inf)
        kind = self._dtype if dtype is None else WEIGHT_DTYPES[dtype]
        array = self._tensors[name].view(kind.numpy).reshape(shape)
        part = array[:, list(rows)].T if transposed else array[list(rows)]
        numbers = kind.widen(np.ascontiguousarray(part)).reshape(len(rows), -1)
        return numbers, np.zeros_like(numbers)

    def _dequantized(self, weight: QuantizedWeight, places: list[int], *, columns: bool) -> tuple[Float32, Float32]:
        """Rows [k, n] of a quantized weight, and the step of each number. Only these rows are dequantized."""
        values = unpack(self._tensors[f"{weight.name}.quantized"], weight.dtype, weight.shape)
        # The scales' last axis is the output channels, with and without blocks.
        scales = read_scales(self._tensors, weight, self._dtype)[..., places]
        values = values[:, places] if columns else values[places]
        numbers = dequantize(values, scales, weight.axis, weight.block)
        steps = np.broadcast_to(spread(scales, values.ndim, weight.axis, weight.block), numbers.shape)
        if weight.dtype == "fp8":  # three bits of mantissa, down to a least step
            steps = np.maximum(np.abs(numbers) * np.float32(2.0**-3), steps * np.float32(2.0**-9))
        elif weight.dtype == "fp4":  # two numbers are at most 2 apart, from 4 to 6
            steps = steps * np.float32(2)
        turned = (array.T if columns else array for array in (numbers, steps))
        first, second = (np.ascontiguousarray(array).reshape(len(places), -1) for array in turned)
        return first, second
