"""The external weights of ONNX files, read without the onnx package, which building engines and running graphs do not need.

Old versions of ONNX Runtime read external data from any place (1.22 does; 1.32 refuses files outside the model's folder), so
`check_external_data` checks a model before anything else loads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array, Bytes
from sana_export.formats.recognize import not_what_was_wanted

#: The fields of onnx.proto3 that lead to external data: message -> field number -> its message or text. Other fields are skipped.
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
#: protobuf's limits for the number of a field with its type, and for a field's length.
_MOST_TAG, _MOST_LENGTH = 2**32, 2**31
_NUMBER = re.compile(r"[0-9]{1,18}")


class Field(NamedTuple):
    """One field of a protobuf message."""

    #: Its number.
    number: int
    #: All of its bytes, including tag and length.
    raw: memoryview
    #: Its content if it is length-delimited: a text, bytes or a message.
    value: memoryview | None


@dataclass(frozen=True)
class ExternalTensor:
    """One initializer whose values are in another file."""

    #: The initializer's name.
    name: str
    #: The file, relative to the model's folder.
    location: str
    #: Where its values start in the file.
    offset: int
    #: Size of its values.
    bytes: int


def external_locations(model: bytes) -> set[str]:
    """The locations of all external data in a serialized ModelProto. Raises ValueError if `model` is damaged."""
    return {tensor.location for tensor in _external(model)}


def check_external_data(model: Path, recorded: Sequence[Path], *, fix: str | None = None) -> None:
    """Raise ArtifactError unless all external weights of the ONNX file `model` are inside files in `recorded`.

    `recorded` are the model's data files in the manifest, which are inside the bundle and were checked.
    """
    sizes = {path.resolve(): path.stat().st_size for path in recorded}
    try:
        for tensor in _external(model.read_bytes()):
            _check_place(model, tensor, sizes, fix)
    except ValueError as error:
        raise not_what_was_wanted(model, "an ONNX model", error, fix=fix) from error


def _check_place(model: Path, tensor: ExternalTensor, sizes: Mapping[Path, int], fix: str | None) -> Path:
    """The file with the values of `tensor`. Raises ArtifactError unless it is one of `sizes` and contains all of them."""
    try:
        place = (model.parent / tensor.location).resolve()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links in a circle
        place = None
    if place is None or place not in sizes:
        raise ArtifactError(
            f"{model} reads its weights from a file that does not belong to the bundle",
            found=tensor.location[:200],
            wanted=", ".join(path.name for path in sizes) or "no external data",
            fix=fix,
        )
    if tensor.offset + tensor.bytes > sizes[place]:
        raise ArtifactError(
            f"{model} does not match its weight files",
            found=f"{tensor.name[:200]} at {tensor.offset} to {tensor.offset + tensor.bytes} of {tensor.location}",
            wanted=f"a range within {place.name} ({sizes[place]} bytes)",
            fix=fix,
        )
    return place


def external_tensors(model: bytes) -> tuple[ExternalTensor, ...]:
    """The external initializers of a serialized ModelProto, in its order. Raises ValueError if `model` is damaged."""
    return tuple(_external(model, only=_TO_INITIALIZERS, required=("location", "length")))


def _external(model: bytes, *, only: Iterable[str] = (), required: tuple[str, ...] = ("location",)) -> Iterator[ExternalTensor]:
    """The external tensors of a serialized ModelProto, in its order. `only`: those that lead there through these messages alone.

    A tensor without a length has 0 bytes here. Raises ValueError if `model` is damaged or a tensor lacks a `required` entry.
    """
    follow = set(only) or _MESSAGES.keys() - {"Entry"}
    pending = [("Model", memoryview(model))]
    while pending:
        message, content = pending.pop()
        name, entries, inner = "", dict[str, str](), list[tuple[str, memoryview]]()
        for number, _, value in message_fields(content):
            field = _MESSAGES[message].get(number)
            if field is None or value is None:
                continue
            if field in follow:
                inner.append((field, value))
            elif field == "name":
                name = bytes(value).decode("utf-8")
            elif field == "Entry":
                key, text = _entry(value)
                if entries.setdefault(key, text) != text:  # readers could differ in which one they take
                    raise ValueError(f"{name[:200]!r} has two values of {key[:200]!r}")
        pending += reversed(inner)
        if entries:
            yield _placed(name, entries, required)


def _placed(name: str, entries: Mapping[str, str], required: tuple[str, ...]) -> ExternalTensor:
    """The tensor whose external data `entries` describes. Raises ValueError if they do not."""
    if missing := [key for key in required if key not in entries]:
        raise ValueError(f"{name[:200]} has external data without {missing[0]!r}")
    for key in ("offset", "length"):
        if not _NUMBER.fullmatch(entries.get(key, "0")):
            raise ValueError(f"{name[:200]} has the {key} {entries[key][:200]!r}")
    return ExternalTensor(name, entries["location"], int(entries.get("offset", 0)), int(entries.get("length", 0)))


def structure_sha256(model: bytes) -> str:
    """The sha256, in hex, of a serialized ModelProto without its external weights: equal for every checkpoint of one structure.

    Constants inside the file count, because an engine contains them. The locations of external weights do not: a weight file stores
    equal tensors once, so the offsets depend on the checkpoint.
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


def read_tensors(onnx: Path, data: Iterable[Path], *, fix: str | None = None) -> dict[str, Bytes]:
    """The bytes of every external weight of the ONNX file, by name, mapped from the disk.

    `data` are the model's data files in the manifest, and `fix` is the command that exports the bundle again. Raises ArtifactError
    if the model reads another file, or past the end of one.
    """
    maps = {path.resolve(): np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8) for path in data}
    sizes = {path: file.size for path, file in maps.items()}
    try:
        found = external_tensors(onnx.read_bytes())
    except ValueError as error:
        raise not_what_was_wanted(onnx, "an ONNX model", error, fix=fix) from error
    tensors: dict[str, Bytes] = {}
    for tensor in found:
        values = maps[_check_place(onnx, tensor, sizes, fix)]
        tensors[tensor.name] = values[tensor.offset : tensor.offset + tensor.bytes]
    return tensors


def copies_of_shared(onnx: Path) -> Mapping[str, Array]:
    """A copy of every external weight that shares its place in the file with an earlier one, by name.

    TensorRT's parser passes pointers into the file to the compiler, and the compiler identifies a weight by its pointer: two
    weights at one place would become one weight with the name of the last. Seen with TensorRT-RTX 1.7.
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
    """Every field of one serialized protobuf message, in order. Raises ValueError if it is damaged."""
    position = 0
    while position < len(content):
        begin = position
        value: memoryview | None = None
        tag, position = _varint(content, position)
        kind = tag & 7
        if not 8 <= tag < _MOST_TAG:  # other readers drop the upper bits, and then find another field here
            raise ValueError(f"a field of number {tag >> 3}")
        if kind == _VARINT:
            _, position = _varint(content, position)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            length, start = _varint(content, position)
            if length >= _MOST_LENGTH:
                raise ValueError(f"a field of {length} bytes")
            position = start + length
            value = content[start:position]
        else:
            raise ValueError(f"a field of wire type {kind}")
        if position > len(content):
            raise ValueError("a field that extends past the end")
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
    raise ValueError("an unterminated number")
