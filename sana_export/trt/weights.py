"""What an ONNX file keeps outside itself: the named weights that an engine without weights is given later.

Read without the onnx package, which building and running do not need.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.errors import ArtifactError
from sana_export.formats.onnx_weights import message_fields

Bytes = npt.NDArray[np.uint8]

#: Fields of onnx.proto3 by message: the way to the initializers, and what of one is read.
_INITIALIZERS = {("Model", 7): "Graph", ("Graph", 5): "Tensor"}
_NAME, _EXTERNAL_DATA, _KEY, _VALUE = 8, 13, 1, 2


@dataclass(frozen=True)
class ExternalTensor:
    """One initializer whose values lie in another file: `bytes` of them from `offset` on. `location` is relative to the model's."""

    name: str
    location: str
    offset: int
    bytes: int


def external_tensors(model: bytes) -> tuple[ExternalTensor, ...]:
    """The initializers of a serialized ModelProto that lie outside it, in its order. ValueError where it is not one."""
    found: list[ExternalTensor] = []

    def visit(message: str, content: memoryview) -> None:
        name, entries = "", {}
        for number, _, value in message_fields(content):
            if value is None:
                continue
            if (inner := _INITIALIZERS.get((message, number))) is not None:
                visit(inner, value)
            elif message == "Tensor" and number == _NAME:
                name = bytes(value).decode("utf-8")
            elif message == "Tensor" and number == _EXTERNAL_DATA:
                pair = {field.number: bytes(field.value or b"").decode("utf-8") for field in message_fields(value)}
                entries[pair.get(_KEY)] = pair.get(_VALUE, "")
        if entries:
            try:
                found.append(ExternalTensor(name, entries["location"], int(entries.get("offset", 0)), int(entries["length"])))
            except KeyError as error:
                raise ValueError(f"{name} does not say its {error.args[0]}") from error

    visit("Model", memoryview(model))
    return tuple(found)


def structure_sha256(model: bytes) -> str:
    """sha256 in hex of a serialized ModelProto without where its external weights lie: equal for all weights of one graph.

    Constants inside the file count, since an engine holds them. Offsets do not: a weight file that keeps equal tensors once has
    other ones for every checkpoint.
    """
    digest = hashlib.sha256()

    def visit(message: str, content: memoryview) -> None:
        for number, raw, value in message_fields(content):
            inner = _INITIALIZERS.get((message, number))
            if inner is not None and value is not None:
                digest.update(b"<")
                visit(inner, value)
                digest.update(b">")
            elif (message, number) != ("Tensor", _EXTERNAL_DATA):
                digest.update(len(raw).to_bytes(8, "little") + bytes(raw))

    visit("Model", memoryview(model))
    return digest.hexdigest()


def read_tensors(onnx: Path, data: Iterable[Path]) -> dict[str, Bytes]:
    """The bytes of every external weight of the ONNX file, by name, mapped from the disk and not read.

    `data`: the files that the manifest binds to the model. Raises ArtifactError where the model reads another file, or beyond the
    end of one.
    """
    maps = {path.resolve(): np.memmap(path, np.uint8, "r") for path in data}
    tensors: dict[str, Bytes] = {}
    for tensor in external_tensors(onnx.read_bytes()):
        values = maps.get((onnx.parent / tensor.location).resolve())
        if values is None or tensor.offset + tensor.bytes > values.size:
            raise ArtifactError(
                f"{onnx} does not fit its weights",
                found=f"{tensor.name} at {tensor.offset} to {tensor.offset + tensor.bytes} of {tensor.location}",
                wanted="a part of " + (", ".join(f"{path.name} ({file.size} bytes)" for path, file in maps.items()) or "no file"),
                fix="export the bundle again: sana-export export MODEL -o BUNDLE",
            )
        tensors[tensor.name] = values[tensor.offset : tensor.offset + tensor.bytes]
    return tensors


def copies_of_shared(onnx: Path) -> Mapping[str, npt.NDArray[Any]]:
    """A copy of every external weight that lies where an earlier one does, by name.

    The parser hands the compiler pointers into the file, and the compiler knows a weight by its pointer: two that share their bytes
    would be one weight with the name of the last. Measured with TensorRT-RTX 1.7.
    """
    taken: set[tuple[str, int]] = set()
    copies = {}
    for tensor in external_tensors(onnx.read_bytes()):
        if (place := (tensor.location, tensor.offset)) in taken:
            copies[tensor.name] = np.fromfile(onnx.parent / tensor.location, np.uint8, tensor.bytes, offset=tensor.offset)
        taken.add(place)
    return copies
