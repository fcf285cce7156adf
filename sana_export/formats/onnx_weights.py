"""The weights that an ONNX file keeps in other files, read without the onnx package, which building and running do not need.

ONNX Runtime refuses locations outside the model's folder only in newer versions (1.32 does, 1.22 reads any file), so
`check_external_data` checks a model before anything else loads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array, Bytes

#: The fields of onnx.proto3 on the way to external data: message -> field number -> the message or text in it. All others are
#: skipped.
_MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {8: "name", 13: "Entry"},
    "Entry": {1: "key", 2: "value"},
}
#: The messages that lead to a graph's initializers.
_TO_INITIALIZERS = ("Graph", "Tensor")
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_VARINT_BYTES = 10


class Field(NamedTuple):
    """One field of a protobuf message: `raw` is all of it, tag and length included; `value` the content where that is bytes."""

    number: int
    raw: memoryview
    value: memoryview | None


def external_locations(model: bytes) -> set[str]:
    """The locations of all external data in a serialized ModelProto, as they are written. ValueError where it is not one."""
    locations: set[str] = set()
    pending = [("Model", memoryview(model))]
    while pending:
        message, content = pending.pop()
        for number, _, value in message_fields(content):
            field = _MESSAGES[message].get(number)
            if field is None or value is None:
                continue
            if field == "Entry":
                key, text = _entry(value)
                if key == "location":
                    locations.add(text)
            elif field in _MESSAGES:
                pending.append((field, value))
    return locations


def check_external_data(model: Path, recorded: Sequence[Path], *, fix: str | None = None) -> None:
    """Raise ArtifactError unless every file that the ONNX file `model` reads weights from is one of `recorded`.

    `recorded` are the files that the manifest binds to the model, so they lie in the bundle and were checked.
    """
    try:
        locations = external_locations(model.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{model} is damaged", found=error, wanted="an ONNX model", fix=fix) from error
    allowed = {path.resolve() for path in recorded}
    for location in sorted(locations):
        if (model.parent / location).resolve() not in allowed:
            raise ArtifactError(
                f"{model} reads its weights from a file that does not belong to the bundle",
                found=location,
                wanted=", ".join(path.name for path in recorded) or "no external data",
                fix=fix,
            )


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
            field = _MESSAGES[message].get(number)
            if field is None or value is None:
                continue
            if field in _TO_INITIALIZERS:
                visit(field, value)
            elif field == "name":
                name = bytes(value).decode("utf-8")
            elif field == "Entry":
                key, text = _entry(value)
                entries[key] = text
        if entries:
            try:
                found.append(ExternalTensor(name, entries["location"], int(entries.get("offset", 0)), int(entries["length"])))
            except KeyError as error:
                raise ValueError(f"{name} has external data without {error.args[0]!r}") from error

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
            field = _MESSAGES[message].get(number)
            if field in _TO_INITIALIZERS and value is not None:
                digest.update(b"<")
                visit(field, value)
                digest.update(b">")
            elif field != "Entry":
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


def copies_of_shared(onnx: Path) -> Mapping[str, Array]:
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


def _entry(content: memoryview) -> tuple[str, str]:
    """The key and the value of one entry of a tensor's external data."""
    names = _MESSAGES["Entry"]
    parts = {
        names[field.number]: bytes(field.value or b"").decode("utf-8") for field in message_fields(content) if field.number in names
    }
    return parts.get("key", ""), parts.get("value", "")


def message_fields(content: memoryview) -> Iterator[Field]:
    """Every field of one serialized protobuf message, in order; ValueError where it is damaged."""
    position = 0
    while position < len(content):
        begin = position
        value: memoryview | None = None
        tag, position = _varint(content, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(content, position)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            length, start = _varint(content, position)
            position = start + length
            value = content[start:position]
        else:
            raise ValueError(f"a field of wire type {kind}")
        if position > len(content):
            raise ValueError("a field that reaches past the end")
        yield Field(tag >> 3, content[begin:position], value)


def _varint(content: memoryview, position: int) -> tuple[int, int]:
    """The base 128 number at `position`, and the position after it."""
    value = 0
    for count in range(_MOST_VARINT_BYTES):
        if position + count >= len(content):
            break
        byte = content[position + count]
        value |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return value, position + count + 1
    raise ValueError("a number without an end")
