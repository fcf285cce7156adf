"""The token embedding table of a bundle: in the checkpoint's dtype, or in 8 bits with a scale for each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Float32
from sana_export.formats.quantized import dequantize
from sana_export.formats.safetensors_file import StoredTensor

#: The names of its tensors in embeddings.safetensors. The second one is there if the table is quantized.
ROWS, SCALES = "embed_tokens.weight", "embed_tokens.scale"


@dataclass(frozen=True, eq=False)
class EmbeddingTable:
    """Rows [n, C], mapped from the disk."""

    #: The numbers, or integers.
    values: StoredTensor
    #: float32 [n]: what the integers of each row are multiplied by. None: the values are the numbers.
    scales: StoredTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, indices: npt.ArrayLike) -> Float32:
        """The rows [k, C] at `indices` [k] as float32. Only these are read from the disk."""
        if self.scales is None:
            return self.values.rows(indices)
        wanted = np.asarray(indices, dtype=np.int64)
        return dequantize(self.values.stored[wanted], self.scales.rows(wanted), axis=0, block=0)
