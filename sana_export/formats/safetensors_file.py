"""Reads .safetensors files as read-only memory maps, without the safetensors package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sana_export.errors import ArtifactError
from sana_export.formats.arrays import Array, Float32
from sana_export.formats.dtypes import BY_SAFETENSORS
from sana_export.formats.recognize import not_what_was_wanted
from sana_export.formats.safetensors_header import TensorEntry, read_header


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

    Raises ArtifactError, with `fix` as the command that fixes it, if the file is damaged or something else, or if it does not
    contain a requested tensor in a supported dtype.
    """

    def __init__(self, path: Path, *, fix: str | None = None) -> None:
        self.path, self._fix = path, fix
        header = read_header(path, fix=fix)
        self.entries, self.metadata = header.entries, header.metadata

    def __getitem__(self, name: str) -> StoredTensor:
        if name not in self.entries:
            found = f"no tensor {name!r}, but {', '.join(self.entries) or 'none at all'}"
            raise ArtifactError(f"{self.path} is damaged", found=found, wanted=f"a file with {name!r}", fix=self._fix)
        entry = self.entries[name]
        if entry.dtype not in BY_SAFETENSORS:
            raise ArtifactError(
                f"{name} in {self.path} has an unsupported dtype",
                found=entry.dtype,
                wanted=", ".join(BY_SAFETENSORS),
                fix=self._fix,
            )
        return StoredTensor(entry.dtype, map_tensor(self.path, entry, BY_SAFETENSORS[entry.dtype].numpy, fix=self._fix))

    def __contains__(self, name: object) -> bool:  # Mapping's own would map the tensor
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def map_tensor(path: Path, entry: TensorEntry, dtype: str, *, writable: bool = False, fix: str | None = None) -> Array:
    """The values of one tensor as an array of the numpy dtype `dtype`, mapped from the file, with a map of its own.

    The array is read-only. If `writable`, what is written to it is not written to the file. Raises ArtifactError if the file
    changed since its header was read.
    """
    if entry.begin == entry.end:
        values: Array = np.zeros(entry.shape, dtype)
        values.flags.writeable = writable
        return values
    try:
        return np.memmap(path, dtype, "c" if writable else "r", entry.begin, entry.shape)
    except (OSError, ValueError) as error:
        raise not_what_was_wanted(path, "the safetensors file that was opened", error, fix=fix) from error
