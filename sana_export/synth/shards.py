"""Writes weights to safetensors files in pieces, with the file names and the index that diffusers and transformers use.

A safetensors file consists of the length of its header (8 bytes, little-endian), the header in JSON (padded with spaces to a
multiple of 8 bytes), and the bytes of the tensors in the order of their names. So writing a file of any size needs the memory of
one piece of one tensor. Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_export.formats.dtypes import WEIGHT_DTYPES

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True)
class StoredWeights:
    """The weights of one network that are to be written."""

    #: The stem of its files' names.
    stem: str
    #: The shapes of its tensors.
    shapes: Mapping[str, tuple[int, ...]]
    #: Gives the values of a tensor by its name: in order, flat, in pieces of any dtype.
    pieces: Callable[[str], Iterable[Tensor]]
    #: The dtype to store them in.
    dtype: dtype

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return sum(map(self._bytes, self.shapes))

    def write(self, folder: Path, shard_size: int, variant: str | None, on_bytes: Callable[[int], None]) -> None:
        """Write one file, or shards of at most `shard_size` bytes and their index, to `folder`.

        A larger tensor gets its own shard. `on_bytes` is called with the number of bytes written since the last call.
        """
        suffix = f".{variant}" if variant else ""
        shards = self._shards(shard_size)
        names = [
            f"{self.stem}{suffix}-{number:05d}-of-{len(shards):05d}.safetensors"
            if len(shards) > 1
            else f"{self.stem}{suffix}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        for name, tensors in zip(names, shards, strict=True):
            self._write_file(folder / name, tensors, on_bytes)
        if len(shards) > 1:
            weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.size}, "weight_map": weight_map}
            path = folder / f"{self.stem}.safetensors.index{suffix}.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _shards(self, shard_size: int) -> list[list[str]]:
        """The names of the tensors in each shard: as many as fit, in the network's order."""
        shards: list[list[str]] = [[]]
        filled = 0
        for name in self.shapes:
            filled += self._bytes(name)
            if filled > shard_size and shards[-1]:
                shards.append([])
                filled = self._bytes(name)
            shards[-1].append(name)
        return shards

    def _write_file(self, path: Path, names: Sequence[str], on_bytes: Callable[[int], None]) -> None:
        import torch

        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        code, offset = WEIGHT_DTYPES[str(self.dtype).removeprefix("torch.")].safetensors, 0
        for name in sorted(names):
            end = offset + self._bytes(name)
            header[name] = {"dtype": code, "shape": list(self.shapes[name]), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in sorted(names):
                for piece in self.pieces(name):
                    stored = piece.detach().to("cpu", self.dtype).contiguous()
                    on_bytes(file.write(stored.flatten().view(torch.uint8).numpy().data))

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype.itemsize
