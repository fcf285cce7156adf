"""Tensors in a GPU's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sana_export.formats.dtypes import DTYPES
from sana_export.runtime.backends.cuda import Memory


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A tensor in the device's memory."""

    #: Where its values start.
    address: int
    #: Its shape.
    shape: tuple[int, ...]
    #: The contract's name of its dtype.
    dtype: str
    #: The memory that it is in, which lives as long as the tensor.
    memory: Memory

    @property
    def nbytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].bytes


class DeviceTable(Sequence[DeviceArray]):
    """Tensors of one shape in one block of memory, each at an address that an engine can read."""

    def __init__(self, memory: Memory, rows: int, stride: int, shape: tuple[int, ...], dtype: str) -> None:
        self.memory, self.stride = memory, stride
        self._rows = [DeviceArray(memory.address + index * stride, shape, dtype, memory) for index in range(rows)]

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)
