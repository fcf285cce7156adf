"""Tensors of one graph from two sides, compared by Polygraphy in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from sana_export.formats.arrays import Array
from sana_export.verify.graph_layers import TensorOrigin
from sana_export.verify.layer_report import TensorRow
from sana_export.verify.polygraphy_package import comparator, quiet

#: Most bytes of the float32 values of one chunk, on each side. A larger tensor is a chunk of its own.
CHUNK_BYTES = 256 << 20


def chunks(origins: Sequence[TensorOrigin], size: Callable[[TensorOrigin], int], most: int) -> Iterator[list[TensorOrigin]]:
    """`origins` in order, in lists whose sizes add up to `most` or less, or of one tensor."""
    chunk: list[TensorOrigin] = []
    total = 0
    for origin in origins:
        if chunk and total + size(origin) > most:
            yield chunk
            chunk, total = [], 0
        chunk.append(origin)
        total += size(origin)
    if chunk:
        yield chunk


def compare(
    origins: Sequence[TensorOrigin], wanted: Mapping[str, Array], found: Mapping[str, Array], limit: float
) -> Iterator[TensorRow]:
    """Polygraphy's signal-to-noise ratio in dB and cosine similarity of each tensor that is in both.

    A tensor passes if its ratio is at least `limit`. One of another shape, or with a value that is not a number, does not.
    """
    module, both = comparator(), [origin for origin in origins if origin.tensor in found]
    for origin in both:
        pair = [side[origin.tensor] for side in (wanted, found)]
        with quiet():
            results = [module.IterationResult({origin.tensor: values}) for values in pair]
            ratio = module.SnrCompareFunc(limit)(*results)[origin.tensor]
            cosine = module.CosineSimilarityCompareFunc()(*results)[origin.tensor]
            largest, largest_found = (float(np.abs(values).max(initial=0.0)) for values in pair)
        yield TensorRow(
            origin,
            pair[0].shape,
            snr_db=float(getattr(ratio, "snr", np.nan)),  # it is False for tensors of different shapes
            cosine=float(getattr(cosine, "cosine_similarity", np.nan)),
            largest=largest,
            largest_found=largest_found,
            passed=bool(ratio),
        )
