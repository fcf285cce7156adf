"""Which weights of a graph are quantized, and in which layout they are stored."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sana_export.checkpoint.checkpoint import SanaCheckpoint
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import scale_shape
from sana_export.graphs.builders import shape_graph
from sana_export.graphs.numerics import Linear
from sana_export.manifest import Options, QuantizedWeight
from sana_export.quantization import BITS, SCHEMES, Scheme, layer_rule, layer_scheme, part_of


def plan_weights(module: nn.Module, graph: str, options: Options) -> dict[str, QuantizedWeight]:
    """The weights of `module`, which is the graph `graph`, that its scheme quantizes, by name."""
    scheme = options.scheme(graph)
    if scheme is None:
        return {}
    planned: dict[str, QuantizedWeight] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        linear = isinstance(module.get_submodule(name.rpartition(".")[0]), Linear)
        rule = layer_rule(part_of(graph), name)
        inputs = parameter.shape[0] if linear else math.prod(parameter.shape[1:])
        if (own := layer_scheme(SCHEMES[scheme], rule, inputs)) is not None:
            planned[name] = _layout(name, parameter, own, linear)
    return planned


def _layout(name: str, parameter: Tensor, scheme: Scheme, linear: bool) -> QuantizedWeight:
    """How a weight is stored: as it is with a scale for each output channel, or as blocks of inputs.

    A `linear` layer's weight is [in, out], every other one [out, in, ...]. TensorRT-RTX 1.7 takes blocks along the first axis of
    a right factor only, so blocks are stored as [in, out] in either case.
    """
    shape = tuple(parameter.shape)
    if not scheme.block:
        return QuantizedWeight(name, scheme.weights, shape, axis=1 if linear else 0)
    if not linear:
        shape = (math.prod(shape[1:]), shape[0])
    return QuantizedWeight(name, scheme.weights, shape, axis=0, block=scheme.block, transposed=not linear)


def stored_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the weights of the graph `name` under `options`, without building it."""
    module, wide = shape_graph(name, checkpoint, options), WEIGHT_DTYPES[options.dtype].bytes
    plan, total = plan_weights(module, name, options), 0
    for parameter, value in module.named_parameters(remove_duplicate=False):
        if (weight := plan.get(parameter)) is None:
            total += value.numel() * value.element_size()
        else:
            scales = math.prod(scale_shape(weight.shape, weight.axis, weight.block))
            total += value.numel() * BITS[weight.dtype] // 8 + scales * wide
    return total
