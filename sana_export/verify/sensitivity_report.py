"""The result of `verify --sensitivity`, as text and as JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

from sana_export.json_records import json_value


@dataclass(frozen=True)
class LayerDamage:
    """One layer, quantized alone with one scheme."""

    #: The graph's name.
    graph: str
    #: The name of the layer's weight.
    layer: str
    #: The weight's shape.
    shape: tuple[int, ...]
    #: The scheme's name.
    scheme: str
    #: The relative error of the graph's outputs: the norm of the difference over the norm of the outputs.
    error: float
    #: Whether the layer's inputs are rounded too.
    rounded_inputs: bool
    #: Whether an export with the scheme quantizes the layer so.
    taken: bool

    @property
    def snr_db(self) -> float:
        """The error as a signal-to-noise ratio in dB. Infinite if nothing changed."""
        return -20 * math.log10(self.error) if self.error else math.inf

    @property
    def kind(self) -> str:
        """The layer's name without the numbers of blocks."""
        return re.sub(r"\d+", "*", self.layer)

    def as_json(self) -> dict[str, Any]:
        derived = {"snr_db": json_value(self.snr_db), "kind": self.kind}
        return {**vars(self), "shape": list(self.shape), "error": json_value(self.error), **derived}

    def as_text(self) -> str:
        """One line."""
        return f"{self.snr_db:6.1f} dB  {self.layer} {list(self.shape)}{_note(self.taken)}"


@dataclass(frozen=True)
class KindDamage:
    """All layers of one kind in one graph, with one scheme."""

    graph: str
    scheme: str
    #: The layers' name without the numbers of blocks.
    kind: str
    #: Number of layers.
    layers: int
    #: The mean of their signal-to-noise ratios in dB.
    mean_db: float
    #: The lowest one.
    worst_db: float
    #: Whether an export with the scheme quantizes them so.
    taken: bool

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "mean_db": json_value(self.mean_db), "worst_db": json_value(self.worst_db)}

    def as_text(self) -> str:
        """One line."""
        return f"{self.mean_db:6.1f} {self.worst_db:6.1f} dB  {self.layers:3} x {self.kind}{_note(self.taken)}"


@dataclass(frozen=True)
class SensitivityReport:
    """Each layer of some graphs quantized alone."""

    #: The bundle's path.
    bundle: str
    #: The bundle's precision, which the scales are rounded to.
    precision: str
    #: The prompts whose runs gave the inputs.
    prompts: tuple[str, ...]
    #: One row for each layer and scheme, graph by graph.
    rows: tuple[LayerDamage, ...]

    def worst(self, graph: str, scheme: str) -> list[LayerDamage]:
        """The layers of a graph with a scheme, the most damaging first."""
        return sorted(self._rows(graph, scheme), key=attrgetter("snr_db"))

    def kinds(self, graph: str, scheme: str) -> list[KindDamage]:
        """The kinds of layers of a graph with a scheme, the one with the most damaging layer first."""
        by_kind = attrgetter("kind")
        found = []
        for kind, group in groupby(sorted(self._rows(graph, scheme), key=by_kind), by_kind):
            rows = [*group]
            ratios = [row.snr_db for row in rows]
            taken = all(row.taken for row in rows)
            found.append(KindDamage(graph, scheme, kind, len(rows), sum(ratios) / len(rows), min(ratios), taken))
        return sorted(found, key=attrgetter("worst_db"))

    def as_json(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "precision": self.precision,
            "prompts": list(self.prompts),
            "kinds": [kind.as_json() for pair in self._pairs() for kind in self.kinds(*pair)],
            "layers": [row.as_json() for pair in self._pairs() for row in self.worst(*pair)],
        }

    def as_text(self, most: int = 10) -> str:
        """For each graph and scheme, the `most` worst layers and all kinds of layers."""
        lines = [f"{self.bundle}: each layer quantized alone; outputs against those of the unquantized graph, in float32"]
        for graph, scheme in self._pairs():
            worst = self.worst(graph, scheme)
            lines += ["", f"{graph}, {scheme}: the worst of {len(worst)} layers"]
            lines += [f"  {row.as_text()}" for row in worst[:most]]
            lines += ["  kinds of layers: mean and worst"]
            lines += [f"  {kind.as_text()}" for kind in self.kinds(graph, scheme)]
        return "\n".join(lines)

    def _rows(self, graph: str, scheme: str) -> Iterator[LayerDamage]:
        return (row for row in self.rows if (row.graph, row.scheme) == (graph, scheme))

    def _pairs(self) -> Iterable[tuple[str, str]]:
        return dict.fromkeys((row.graph, row.scheme) for row in self.rows)


def _note(taken: bool) -> str:
    return "" if taken else " (an export does not quantize it)"
