"""Tensors of safetensors files by name, read one at a time and not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sana_export.errors import ArtifactError
from sana_export.formats.dtypes import BY_SAFETENSORS
from sana_export.formats.safetensors_file import map_tensor
from sana_export.formats.safetensors_header import TensorEntry, read_header

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored."""

    #: The safetensors file.
    path: Path
    #: Its name in the file.
    name: str
    #: Its dtype, shape and place, as in the file's header.
    entry: TensorEntry

    @property
    def dtype(self) -> str:
        """The name of its dtype in the safetensors format."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.entry.bytes

    def part(self, first: int, last: int) -> Stored:
        """The rows from `first` to `last`, which is not included."""
        rows, begin = self.shape[0], self.entry.begin
        row = self.bytes // max(rows, 1)
        entry = replace(self.entry, shape=(last - first, *self.shape[1:]), begin=begin + first * row, end=begin + last * row)
        return replace(self, entry=entry)

    def read(self) -> Tensor:
        """The tensor, mapped from the file.

        Each tensor has its own map, which is closed with it. A file that stays open would keep every page that was ever read.
        Raises ArtifactError for a dtype that weights cannot have.
        """
        import torch

        if self.dtype not in BY_SAFETENSORS:
            raise ArtifactError(
                f"{self.name} in {self.path} has an unsupported dtype", found=self.dtype, wanted=", ".join(BY_SAFETENSORS)
            )
        dtype = BY_SAFETENSORS[self.dtype]
        values = map_tensor(self.path, self.entry, dtype.numpy, writable=True)
        if values.ctypes.data % dtype.bytes:  # torch wants aligned values
            values = values.copy()
        return torch.from_numpy(values).view(getattr(torch, dtype.name))


class Weights(Mapping[str, "Tensor"]):
    """The tensors of one component. Each access reads the tensor from its file; only the headers are kept."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header."""
        return self.stored[name].shape

    def on_meta(self) -> dict[str, Tensor]:
        """Tensors of the same names and shapes without values, on torch's meta device."""
        import torch

        return {name: torch.empty(entry.shape, device="meta") for name, entry in self.stored.items()}

    @property
    def bytes(self) -> int:
        """Size of all tensors in their files."""
        return sum(entry.bytes for entry in self.stored.values())

    def dtype(self) -> str:
        """The safetensors dtype that most bytes are stored in: "F32", "F16" or "BF16"."""
        share: Counter[str] = Counter()
        for entry in self.stored.values():
            share[entry.dtype] += entry.bytes
        return share.most_common(1)[0][0]


def read_headers(files: Iterable[Path], *, fix: str = "download the checkpoint again") -> dict[str, Stored]:
    """Every tensor of the safetensors files, by name. Raises ArtifactError if a file is damaged, truncated or something else."""
    return {name: Stored(path, name, entry) for path in files for name, entry in read_header(path, fix=fix).entries.items()}
