"""Weights to safetensors files a piece at a time, under the names and with the index that diffusers and transformers write.

A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON (padded with blanks to 8 bytes), and the
tensors' bytes one after the other, in the order of their names. So a file of any size needs no more memory than one piece of one
tensor. (The format: https://github.com/huggingface/safetensors.)
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
    """One network's weights on their way to disk.

    `stem` begins the names of its files, `shapes` are its tensors, and `pieces(name)` gives a tensor's values in order, flat and in
    any dtype; they are stored as `dtype`.
    """

    stem: str
    shapes: Mapping[str, tuple[int, ...]]
    pieces: Callable[[str], Iterable[Tensor]]
    dtype: dtype

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self._bytes, self.shapes))

    def write(self, folder: Path, shard_size: int, variant: str | None, on_bytes: Callable[[int], None]) -> None:
        """Write the file, or the shards of at most `shard_size` bytes and their index, into `folder`.

        A tensor larger than that is a shard of its own. `on_bytes` is called with the bytes written since it was called last.
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
        """The names of the tensors of each shard: in the network's order, as many as fit."""
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
