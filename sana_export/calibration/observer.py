"""Observes the inputs of a graph's layers in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from sana_export.formats.arrays import Float32
from sana_export.graphs.products import ProductMode


class InputSample:
    """The largest magnitude of each channel of a tensor, and a uniform random sample of its rows. Equal runs give equal samples."""

    def __init__(self, channels: int, most_rows: int) -> None:
        self.maximum: Float32 = np.zeros(channels, np.float32)
        self._rows: Float32 = np.empty((most_rows, channels), np.float32)
        self._seen = 0
        self._random = np.random.default_rng(0)

    @property
    def rows(self) -> Float32:
        """The sample [R, channels]; fewer rows than asked for if there were fewer."""
        return self._rows[: self._seen]

    def add(self, rows: Tensor) -> None:
        """See `rows` [N, channels]."""
        self.maximum = np.maximum(self.maximum, rows.abs().amax(0).float().numpy())
        room = max(len(self._rows) - self._seen, 0)
        first = rows[:room]
        self._rows[self._seen : self._seen + len(first)] = first.float().numpy()
        # Reservoir sampling: of k rows seen, each is kept with the same probability.
        order = np.arange(self._seen + len(first), self._seen + len(rows))
        places = (self._random.random(len(order)) * (order + 1)).astype(np.int64)
        kept = np.flatnonzero(places < len(self._rows))
        self._rows[places[kept]] = rows[torch.from_numpy(kept + len(first))].float().numpy()
        self._seen += len(rows)


class GraphInputs:
    """The inputs of the layers of a graph, each by the name of its weight. Layers that read one tensor in a row share a sample."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._last: tuple[Tensor, str] | None = None
        #: The layer whose sample a layer shares: itself for the first one that reads a tensor.
        self.owners: dict[str, str] = {}
        #: By owner.
        self.samples: dict[str, InputSample] = {}

    def add(self, name: str, x: Tensor, axis: int) -> None:
        """See the input `x` of the layer `name`, whose channels are on `axis`."""
        shared = self._last[1] if self._last is not None and self._last[0] is x else name
        owner = self.owners.setdefault(name, shared)
        if owner == name:
            rows = x.movedim(axis, -1).flatten(0, -2)
            if name not in self.samples:
                self.samples[name] = InputSample(rows.shape[-1], self._most_rows)
            self.samples[name].add(rows)
        self._last = (x, owner)


class ObservedProducts(ProductMode):
    """Adds the inputs of the layers with `weights`, by name, to `seen`."""

    def __init__(self, weights: Mapping[str, Tensor], seen: GraphInputs) -> None:
        super().__init__(weights)
        self._seen = seen

    def product(self, name: str, multiply: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
        self._seen.add(name, x, axis)
        return multiply(x)
