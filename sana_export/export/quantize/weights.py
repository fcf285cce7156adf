"""Builds a deployment graph with quantized weights.

The module gets the numbers that its quantized weights stand for, so it is the reference for the ONNX file, which stores integers
and scales. The weight file gets only what the ONNX file reads. What the module itself needs lies in temporary files beside it, so
the weights are never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.export.quantize.plan import plan_weights
from sana_export.export.quantize.rounding import round_to_nearest
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import as_stored, as_used, pack
from sana_export.graphs.builders import build_graph
from sana_export.graphs.storage import Slice, WeightFile, stored_in
from sana_export.manifest import Options, QuantizedWeight
from sana_export.quantization import BITS


@dataclass(frozen=True)
class StoredWeight:
    """Where the weight file has a quantized weight."""

    weight: QuantizedWeight
    #: Its integers, as `formats.quantized.pack` stores them.
    values: Slice
    #: Its scales, in the graph's precision.
    scales: Slice


@contextlib.contextmanager
def built(
    name: str, checkpoint: SanaCheckpoint, options: Options, weights: WeightFile
) -> Iterator[tuple[nn.Module, dict[str, StoredWeight]]]:
    """The graph `name` with its weights in `weights`, and its quantized weights by name.

    Use the module inside the block only: what it reads is deleted then.
    """
    if options.scheme(name) is None:
        with stored_in(weights):
            module = build_graph(name, checkpoint, options)
        yield module, {}
        return
    with (
        tempfile.TemporaryDirectory(prefix="tmp-", dir=weights.path.parent, ignore_cleanup_errors=True) as folder,
        WeightFile(Path(folder) / "rounded") as rounded,
    ):
        with WeightFile(Path(folder) / "whole") as whole:
            with stored_in(whole):
                module = build_graph(name, checkpoint, options)
            stored = _quantize(module, name, options, whole, rounded, weights)
        with contextlib.suppress(OSError):  # Windows keeps mapped files
            whole.path.unlink()
        yield module, stored
        rounded.release()


def _quantize(
    module: nn.Module, graph: str, options: Options, whole: WeightFile, rounded: WeightFile, weights: WeightFile
) -> dict[str, StoredWeight]:
    """Move the parameters of `module` from `whole` to `rounded` if they are quantized, otherwise to `weights`."""
    plan, dtype = plan_weights(module, graph, options), WEIGHT_DTYPES[options.dtype]
    stored: dict[str, StoredWeight] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if (weight := plan.get(name)) is None:
            parameter.data = weights.keep(parameter.data)
        else:
            matrix = as_stored(parameter.data.float().numpy(), weight.transposed)
            found = round_to_nearest(matrix, BITS[weight.dtype], weight.axis, weight.block, dtype)
            values = weights.append(pack(found.values, weight.dtype))
            scales = weights.append(np.ascontiguousarray(found.scales).reshape(-1).view(np.uint8))
            stored[name] = StoredWeight(weight, values, scales)
            numbers = torch.from_numpy(as_used(found.numbers, weight.transposed, tuple(parameter.shape)))
            parameter.data = rounded.keep(numbers.to(parameter.dtype))
        whole.release()
        rounded.release()
    return stored
