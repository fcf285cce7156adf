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
from sana_export.quantization.choice import method_of
from sana_export.quantization.layers import layer_rule, layer_scheme, part_of
from sana_export.quantization.method import Method
from sana_export.quantization.schemes import BITS, FALLBACK, SCALE_BYTES, SCHEMES, Scheme

#: A branch has at most one rank for so many channels on the narrower side of its layer. With more it would not save much.
NARROWEST = 32


def quantizable(module: nn.Module, graph: str) -> dict[str, Tensor]:
    """The weights of `module`, which is the graph `graph`, that some scheme quantizes, by name."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {name: value for name, value in parameters if layer_rule(part_of(graph), name).bits < 16}


def plan_weights(module: nn.Module, graph: str, options: Options) -> dict[str, QuantizedWeight]:
    """The weights of `module`, which is the graph `graph`, that its scheme quantizes, by name."""
    name = options.scheme(graph)
    if name is None:
        return {}
    scheme, planned = SCHEMES[name], dict[str, QuantizedWeight]()
    method, part = method_of(scheme, options.quantize_method), part_of(graph)
    for weight, parameter in module.named_parameters(remove_duplicate=False):
        linear = isinstance(module.get_submodule(weight.rpartition(".")[0]), Linear)
        inputs = parameter.shape[0] if linear else math.prod(parameter.shape[1:])
        if (own := layer_scheme(part, layer_rule(part, weight), scheme, inputs)) is not None:
            planned[weight] = layer_layout(weight, parameter, own, linear, method)
    return planned


def layer_layout(name: str, parameter: Tensor, scheme: Scheme, linear: bool, method: Method) -> QuantizedWeight:
    """How a weight may be stored: as it is with a scale for each output channel, or as blocks of inputs.

    A `linear` layer's weight is [in, out], every other one [out, in, ...]. TensorRT-RTX 1.7 takes blocks along the first axis of
    a right factor only, so blocks are stored as [in, out] in either case. So are the weights of layers with rounded inputs: ONNX
    Runtime has integer products for right factors only.
    """
    shape, transposed = tuple(parameter.shape), False
    rescaled = method.rescale and scheme is not FALLBACK
    if not linear and (scheme.block or scheme.inputs):
        shape, transposed = (math.prod(shape[1:]), shape[0]), True
    rank = min(method.rank, min(shape) // NARROWEST) if scheme.block else 0
    moves = rescaled or rank > 0 or ((method.search or method.gptq) and scheme.weights != "fp8")
    return QuantizedWeight(
        name,
        scheme.weights,
        shape,
        axis=0 if scheme.block or not (linear or transposed) else 1,
        block=scheme.block,
        transposed=transposed,
        nearest=not moves,
        inputs=scheme.inputs,
        rescaled=rescaled,
        rank=rank,
    )


def stored_bytes(name: str, checkpoint: SanaCheckpoint, options: Options) -> int:
    """Bytes of the weights of the graph `name` under `options`, without building it."""
    module, wide = shape_graph(name, checkpoint, options), WEIGHT_DTYPES[options.dtype].bytes
    plan, total = plan_weights(module, name, options), 0
    for parameter, value in module.named_parameters(remove_duplicate=False):
        if (weight := plan.get(parameter)) is None:
            total += value.numel() * value.element_size()
        else:
            scales = math.prod(scale_shape(weight.shape, weight.axis, weight.block))
            total += value.numel() * BITS[weight.dtype] // 8 + scales * SCALE_BYTES.get(weight.dtype, wide)
            total += weight.rank * sum(weight.shape[:2]) * wide
    return total
