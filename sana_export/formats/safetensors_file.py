"""Reads .safetensors files as read-only memory maps, without the safetensors package.

A file starts with the length of its header (8 bytes, little-endian). The header is JSON: for each name the dtype, the shape and the
range of bytes after the header. The values follow. Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array, Float32
from sana_export.formats.dtypes import BY_SAFETENSORS

#: Extensions of pickled weights. They are refused, because a pickle can run code when it is loaded.
PICKLES = (".bin", ".pth", ".pt", ".ckpt")

_LENGTH_BYTES = 8


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a file."""

    #: Its dtype, as in the file's header.
    dtype: str
    #: Its values as they are stored, mapped from the file.
    stored: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self) -> Array:
        """All values, floating-point ones as float32. They are a copy unless they are stored that way."""
        return self._decode(self.stored)

    def rows(self, indices: npt.ArrayLike) -> Float32:
        """The rows [n, ...] at `indices` [n] as float32. Only these are read from the disk."""
        return np.asarray(self._decode(self.stored[np.asarray(indices, dtype=np.int64)]), dtype=np.float32)

    def _decode(self, values: Array) -> Array:
        dtype = BY_SAFETENSORS[self.dtype]
        return dtype.widen(values) if dtype.floating else values


class TensorFile(Mapping[str, StoredTensor]):
    """The tensors of the .safetensors file at `path`, by name. `metadata` is the file's own metadata.

    Raises ArtifactError, with `fix` as the command that fixes it, if the file is damaged or does not contain a requested tensor.
    """

    def __init__(self, path: Path, *, fix: str | None = None) -> None:
        self.path, self._fix = path, fix
        try:
            data = np.memmap(path, dtype=np.uint8, mode="r")
            self._tensors, self.metadata = _parse(data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise self._damaged(f"no tensor {name!r}, but {', '.join(self._tensors) or 'none at all'}")
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _damaged(self, found: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is damaged", found=found, wanted="a complete safetensors file", fix=self._fix)


def _parse(data: npt.NDArray[np.uint8]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors and the metadata of a mapped file. Raises ValueError, KeyError or TypeError if it is damaged."""
    length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
    start = _LENGTH_BYTES + length
    if not _LENGTH_BYTES < start <= data.size:
        raise ValueError(f"a header of {length} bytes in a file of {data.size} bytes")
    header: dict[str, Any] = json.loads(data[_LENGTH_BYTES:start].tobytes())
    values = data[start:]
    metadata = dict(header.pop("__metadata__", None) or {})
    return {name: _tensor(name, entry, values) for name, entry in header.items()}, metadata


def _tensor(name: str, entry: Mapping[str, Any], values: npt.NDArray[np.uint8]) -> StoredTensor:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in BY_SAFETENSORS:
        raise ValueError(f"{name} is stored as {dtype}, which is none of {', '.join(BY_SAFETENSORS)}")
    stored = np.dtype(BY_SAFETENSORS[dtype].numpy)
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name} has the shape {shape} and the bytes {begin} to {end}")
    if not begin <= end <= values.size or end - begin != math.prod(shape) * stored.itemsize:
        raise ValueError(f"{name} of shape {shape} does not fit the bytes {begin} to {end} of {values.size} bytes of values")
    return StoredTensor(dtype, values[begin:end].view(stored).reshape(shape))
