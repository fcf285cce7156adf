"""The layers of an engine after fusion, as its builder lists them.

If the profiling verbosity is DETAILED, TensorRT-RTX logs every layer at the end of a build, with the tensors that it reads and
writes. No engine has to be loaded for this, so it needs no GPU.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sana_export.errors import ArtifactError

#: How the message with the list begins.
HEAD = "Layers:\n"
#: Bits of a number, by TensorRT's name of its type.
_BITS = {
    "Float": 32,
    "Half": 16,
    "BFloat16": 16,
    "Int32": 32,
    "Int64": 64,
    "Bool": 8,
    "Int8": 8,
    "UInt8": 8,
    "FP8": 8,
    "FP4E2M1": 4,
}
#: Kinds that are not kernels: they order the streams of an engine, or compute shapes on the host and copy them.
_BOOKKEEPING = frozenset({"signal", "wait", "shape_call", "ShapeHostToDevice"})
_KIND = re.compile(r"Name: .*?, LayerType: (\w+), ")
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?, StreamId: \d+.*?, Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(
    r"\{ Name: (\S*), Dimensions: \[([-\d,]*)\], Strides: \[([-\d,]*)\], StrideOrder: \[[-\d,]*\], "
    r"Datatype: (\w+), Format: \((.*?)\)"
)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer reads or writes."""

    #: The builder's name for it.
    name: str
    #: Its sizes. -1 for a size that the engine accepts a range of.
    shape: tuple[int, ...]
    #: Its strides, in numbers.
    strides: tuple[int, ...]
    #: TensorRT's name of its type.
    dtype: str
    #: TensorRT's name of its layout.
    layout: str

    @property
    def bytes(self) -> int | None:
        """Its size in memory. An axis with stride 0 has one number. None if a size is not fixed."""
        if min(self.shape, default=1) < 0:
            return None
        axes = zip(self.shape, self.strides, strict=True)
        return math.prod(size if stride else 1 for size, stride in axes) * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine."""

    #: The builder's name for it. A generated kernel has those of its operations in it, shortened.
    name: str
    #: TensorRT's name of its kind: "gemm" is a product from a library, "runtime_fusion" a product with what is fused to it, and
    #: "kgen" a generated kernel.
    kind: str
    #: What it reads.
    inputs: tuple[LayerTensor, ...]
    #: The weights that it reads.
    constants: tuple[LayerTensor, ...]
    #: What it writes.
    outputs: tuple[LayerTensor, ...]
    #: The ONNX nodes that it computes.
    nodes: tuple[str, ...]


def parse_layers(text: str) -> tuple[EngineLayer, ...]:
    """The kernels in a builder's message that begins with `HEAD`. Raises ArtifactError for a list of another form."""
    lines = text.removeprefix(HEAD).partition("\n\n")[0].splitlines()
    kinds = [match and match[1] for match in map(_KIND.match, lines)]
    return tuple(_layer(line) for line, kind in zip(lines, kinds, strict=True) if kind not in _BOOKKEEPING)


def _layer(line: str) -> EngineLayer:
    match = _LAYER.match(line)
    if match is None:
        raise ArtifactError(
            "the builder's list of layers cannot be read", found=repr(line[:200]), wanted="the form of TensorRT-RTX 1.7"
        )
    return EngineLayer(
        match["name"],
        match["kind"],
        _tensors(match["inputs"]),
        _tensors(match["constants"]),
        _tensors(match["outputs"]),
        tuple(_NODE.findall(match["metadata"])),
    )


def _tensors(text: str) -> tuple[LayerTensor, ...]:
    return tuple(
        LayerTensor(name, _numbers(shape), _numbers(strides), dtype, layout)
        for name, shape, strides, dtype, layout in _TENSOR.findall(text)
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)
