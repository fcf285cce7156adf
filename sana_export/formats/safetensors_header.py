"""The header of a .safetensors file, checked as the safetensors library checks it, before memory is taken for what it describes.

A file starts with the length of its header (8 bytes, little-endian). The header is JSON: for each name the dtype, the shape and the
range of bytes after the header. The values follow, without gaps. Source: https://github.com/huggingface/safetensors, "Format".

What the library takes and this refuses, which no program writes: a name that occurs twice (the library takes the last one), an
entry or a dtype in another form of JSON, more than `MOST_TENSORS` tensors, more than `MOST_DIMENSIONS` dimensions, and a tensor
without values whose other sizes are too large for an array. What the library refuses and this takes: unknown fields that nest deep.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sana_export.errors import ArtifactError
from sana_export.formats.recognize import not_what_was_wanted

#: Bits of one value of each dtype of the format.
BITS: dict[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
#: The longest header in bytes, as in the safetensors library.
MOST_HEADER = 100_000_000
#: The most tensors of a file.
MOST_TENSORS = 50_000
#: The most dimensions of a tensor, as in numpy 1.
MOST_DIMENSIONS = 32

_WANTED = "a safetensors file"
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
_MOST_SIZE = 2**64 - 1
#: Texts, brackets and commas of one tensor in the header.
_TOKENS_PER_TENSOR = 24
_TOKEN = re.compile(rb'"(?>[^"\\]++|\\.)*+"?|[{\[,]', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor, as the header describes it."""

    #: The name of its dtype in the format.
    dtype: str
    #: Its shape.
    shape: tuple[int, ...]
    #: Where its values begin and end in the file.
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The header of one file."""

    #: The tensors by name, in the header's order.
    entries: Mapping[str, TensorEntry]
    #: The file's own texts by name.
    metadata: Mapping[str, str]


def read_header(path: Path, *, fix: str | None = None) -> Header:
    """The header of the .safetensors file at `path`.

    Raises ArtifactError, with `fix` as the command that fixes it, if the file is damaged, truncated or something else.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            start = _LENGTH_BYTES + length
            if length > MOST_HEADER or start > status.st_size or status.st_size < _LENGTH_BYTES:
                raise ValueError(f"a header of {length} bytes in a file of {status.st_size} bytes")
            return parse_header(file.read(length), start, status.st_size)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing", found="no such file", wanted=_WANTED, fix=fix) from error
    except (OSError, ValueError, RecursionError) as error:
        raise not_what_was_wanted(path, _WANTED, error, fix=fix) from error


def parse_header(raw: bytes, start: int, size: int) -> Header:
    """The header whose JSON is `raw`, of a file of `size` bytes whose values begin at `start`.

    Raises ValueError or RecursionError if it is not one.
    """
    document = _json(raw)
    metadata = document.pop(_METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{_METADATA} is not a table of texts")
    entries = {name: _entry(name, entry, start) for name, entry in document.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            raise ValueError(f"the values of {name} begin at byte {entry.begin} instead of {end}")
        end = entry.end
    if end != size:
        raise ValueError(f"{size} bytes, of which the header describes {end}")
    return Header(entries, metadata)


def _json(raw: bytes) -> dict[str, Any]:
    text = raw.decode("utf-8")
    _check_amount(raw)
    hooks: dict[str, Any] = {"parse_constant": _no_number, "parse_int": _integer, "parse_float": _finite}
    document = json.loads(text, object_pairs_hook=_unique, **hooks)
    if not isinstance(document, dict):
        raise ValueError("a header that is not a JSON object")
    if _SURROGATE.search(raw):  # half of a character, which JSON can write and UTF-8 cannot
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def _check_amount(raw: bytes) -> None:
    """Raise ValueError if the JSON text contains more than `MOST_TENSORS` tensors do. It takes no memory."""
    most = _TOKENS_PER_TENSOR * MOST_TENSORS
    if len(raw) > most and next(islice(_TOKEN.finditer(raw), most, None), None) is not None:
        raise ValueError(f"more than {MOST_TENSORS} tensors have")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name that occurs twice")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _integer(text: str) -> int | float:
    # As in the library, -0 and what does not fit 64 bits are not integers.
    return float(text) if text == "-0" or len(text) > 20 else int(text)


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:20]} is out of range")
    return number


def _entry(name: str, entry: Any, start: int) -> TensorEntry:
    shown = repr(name[:200])
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{shown} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{shown} has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown} has the shape {str(shape)[:80]} and the bytes {str(offsets)[:80]}")
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"{shown} has {len(shape)} dimensions, more than {MOST_DIMENSIONS}")
    bits = BITS[dtype] * math.prod(shape)
    if BITS[dtype] * math.prod(size or 1 for size in shape) > _MOST_SIZE:
        raise ValueError(f"{shown} has the shape {shape}, which is too large")
    begin, end = offsets
    if bits % 8 or end - begin != bits // 8:
        raise ValueError(f"{shown} of dtype {dtype} and shape {shape} does not fit the bytes {begin} to {end}")
    return TensorEntry(dtype, tuple(shape), start + begin, start + end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= _MOST_SIZE for value in values)
