"""Which files an ONNX model reads its weights from: found without the onnx package, which the runtime does not need.

ONNX Runtime refuses locations outside the model's folder only in newer versions (1.32 does, 1.22 reads any file), so a bundle
is checked here before a model is handed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sana_export.errors import ArtifactError

#: The messages of onnx.proto3 on the way to external data: message -> field number -> message. What is not named is skipped.
_MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {1: "key", 2: "value"},
}
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
        fields = _MESSAGES[message]
        parts: dict[str, str] = {}
        for number, _, value in message_fields(content):
            if value is None or number not in fields:
                continue
            if message == "Entry":
                parts[fields[number]] = bytes(value).decode("utf-8")
            else:
                pending.append((fields[number], value))
        if parts.get("key") == "location":
            locations.add(parts.get("value", ""))
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
