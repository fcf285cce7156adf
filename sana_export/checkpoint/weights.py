"""Tensors of safetensors files by name, read one at a time and not kept."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sana_export.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """Where a tensor is stored."""

    #: The safetensors file.
    path: Path
    #: Its name in the file.
    name: str
    #: Its dtype, as in the file's header.
    dtype: str
    #: Its shape.
    shape: tuple[int, ...]
    #: First and end of the rows of the file's tensor that it consists of. None: all of them.
    rows: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        bits = re.search(r"\d+", self.dtype)  # of "F32", "BF16", "F8_E4M3"; a "BOOL" takes a byte
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8

    def part(self, first: int, last: int) -> Stored:
        """The rows from `first` to `last`, which is not included."""
        if (first, last) == (0, self.shape[0]):
            return self
        return replace(self, shape=(last - first, *self.shape[1:]), rows=(first, last))

    def read(self) -> Tensor:
        """The tensor, mapped from the file.

        Each tensor has its own map, which is closed with it. A file that stays open would keep every page that was ever read.
        """
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            if self.rows is None:
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[slice(*self.rows)]


class Weights(Mapping[str, "Tensor"]):
    """The tensors of one component. Each access reads the tensor from its file; only the headers are kept."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = dict(stored)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].read()

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
    """Every tensor of the safetensors files, by name. Raises ArtifactError if a file is damaged or truncated."""
    from safetensors import SafetensorError, safe_open

    stored = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (a file is not a mapping)
                    header = file.get_slice(name)
                    stored[name] = Stored(path, name, str(header.get_dtype()), tuple(header.get_shape()))
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{path} is damaged or truncated", found=str(error), wanted="a whole safetensors file", fix=fix
            ) from error
    return stored
