"""Where the parameters of a deployment graph are: in memory, or in the bundle's weight file.

A laptop cannot hold a published transformer twice. Under `stored_in`, every parameter is appended to a `WeightFile` as soon as it
is computed and read again through a memory map. So a graph is built, traced and checked with one tensor in memory at a time, and
its weights are written once.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sana_export.environment import return_free_memory

#: Every tensor starts at a page boundary, so that readers of the file can map it.
ALIGNMENT = 4096
#: After writing this many bytes, the memory in which they were computed is returned to the system.
TRIM_BYTES = 64 << 20


@dataclass(frozen=True)
class Slice:
    """Bytes of a weight file."""

    offset: int
    length: int


class WeightFile:
    """Tensors appended to the file `path`, equal ones once, and mapped from it again.

    The maps are private: writes to such a tensor do not change the file. Do not write to one while its pages are returned to the
    system (export/mapped_pages.py): what was written would be lost.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.bytes = 0
        self._file: BinaryIO = path.open("wb")
        self._known: dict[bytes, Slice] = {}
        self._places: dict[int, Slice] = {}
        self._maps: list[mmap.mmap] = []
        self._trimmed = 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, data: npt.NDArray[np.uint8]) -> Slice:
        """Write `data` unless the file has the same bytes already, and return where they are."""
        digest = hashlib.sha256(data.data).digest()
        if digest not in self._known:
            self._file.seek(-self.bytes % ALIGNMENT, 1)
            self._known[digest] = Slice(self._file.tell(), data.nbytes)
            self._file.write(data.data)
            self._file.flush()
            self.bytes = self._file.tell()
            if self.bytes - self._trimmed > TRIM_BYTES:
                return_free_memory()
                self._trimmed = self.bytes
        return self._known[digest]

    def keep(self, value: Tensor) -> Tensor:
        """A tensor with the shape, dtype and numbers of `value` whose memory is the file."""
        place = self.append(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        kept = self.read(place, value.dtype).view(value.shape)
        self._places[kept.data_ptr()] = place
        return kept

    def read(self, place: Slice, dtype: torch.dtype) -> Tensor:
        """The numbers at `place`, as one row, mapped from the file."""
        start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            length = place.offset - start + place.length
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)
        self._maps.append(mapped)
        return torch.from_numpy(np.frombuffer(mapped, np.uint8, place.length, place.offset - start)).view(dtype)

    def place(self, value: Tensor) -> Slice | None:
        """Where the file has a tensor that `keep` returned; None for any other tensor."""
        return self._places.get(value.data_ptr())

    def release(self) -> None:
        """Return the memory of pages that were read to the system. The tensors stay usable."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


class Keeper(Protocol):
    """What takes parameters: a `WeightFile`, or an observer of them."""

    def keep(self, value: Tensor) -> Tensor: ...


_CURRENT: ContextVar[Keeper | None] = ContextVar("weight_file", default=None)


@contextlib.contextmanager
def stored_in(file: Keeper) -> Iterator[None]:
    """Parameters of graphs that are built inside this context are kept in `file`."""
    token = _CURRENT.set(file)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def keep(value: Tensor) -> Tensor:
    """`value`, kept in the file of `stored_in` or in memory."""
    file = _CURRENT.get()
    return value if file is None else file.keep(value)
