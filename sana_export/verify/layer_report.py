"""The result of `verify --layers`, as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from sana_export.json_records import json_value
from sana_export.verify.graph_layers import TensorOrigin


@dataclass(frozen=True)
class TensorRow:
    """One tensor, computed in two ways."""

    #: Where it comes from.
    origin: TensorOrigin
    #: Its shape.
    shape: tuple[int, ...]
    #: Polygraphy's signal-to-noise ratio in dB. NaN if a value is not a number on one side.
    snr_db: float
    #: Polygraphy's cosine similarity.
    cosine: float
    #: The largest magnitude in float32.
    largest: float
    #: The largest magnitude on the other side.
    largest_found: float
    #: Whether the ratio meets the limit.
    passed: bool
    #: Whether it misses the limit, and so do all tensors on some way from it to an output of the graph.
    drifts: bool = False

    @property
    def verdict(self) -> str:
        """A tensor that recovers misses the limit, but what is made of it does not: the reciprocal of a small sum, for example."""
        return "ok" if self.passed else "DRIFTS" if self.drifts else "recovers"

    def as_json(self) -> dict[str, Any]:
        measured = {key: json_value(value) for key, value in vars(self).items() if key != "origin"}
        return {**vars(self.origin), "place": self.origin.place, **measured, "shape": list(self.shape)}

    def as_text(self) -> str:
        """One line."""
        origin = self.origin
        return (
            f"{self.verdict:8} {self.snr_db:6.1f} dB  cosine {self.cosine:.6f}  "
            f"largest {self.largest:.4g} / {self.largest_found:.4g}  {origin.operator} {origin.tensor} "
            f"{list(self.shape)} {origin.dtype}  [{origin.layer or 'inputs'}: {origin.place}]"
        )


@dataclass(frozen=True)
class Reproducer:
    """The saved part of the graph that computes the first tensor that drifts."""

    #: Its folder.
    folder: str
    #: Number of its nodes.
    nodes: int
    #: Its own signal-to-noise ratio in dB.
    snr_db: float
    #: Whether it misses the limit on its own. If not, errors of earlier layers add up.
    reproduces: bool
    #: The command that runs it.
    command: str

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "snr_db": json_value(self.snr_db)}


@dataclass(frozen=True)
class LayerReport:
    """Every float tensor of one graph, computed in two ways."""

    #: The bundle's path.
    bundle: str
    #: The graph's name.
    graph: str
    #: The bundle's precision.
    precision: str
    #: What the two ways are.
    sides: tuple[str, str]
    #: Where the inputs come from.
    inputs: str
    #: The lowest signal-to-noise ratio in dB.
    limit_db: float
    #: One row for each tensor, in the order of the nodes.
    rows: tuple[TensorRow, ...]
    #: What reproduces the first tensor that drifts. None if none does.
    reproducer: Reproducer | None = None

    @property
    def passed(self) -> bool:
        """Whether no tensor drifts."""
        return self.first is None

    @property
    def first(self) -> TensorRow | None:
        """The first tensor that drifts."""
        return next((row for row in self.rows if row.drifts), None)

    def as_json(self) -> dict[str, Any]:
        head = {key: getattr(self, key) for key in ("bundle", "graph", "precision", "inputs", "limit_db", "passed")}
        found = {"first": self.first, "reproducer": self.reproducer}
        answers = {key: None if value is None else value.as_json() for key, value in found.items()}
        versions = {name: version(name) for name in ("polygraphy", "onnxruntime", "onnx")}
        return {
            **head,
            "sides": list(self.sides),
            **answers,
            "versions": versions,
            "tensors": [row.as_json() for row in self.rows],
        }

    def as_text(self, before: int = 3, after: int = 5) -> str:
        """The rows around the first tensor that drifts, its place, and the reproducer. If none drifts, the worst rows."""
        lines = [
            f"{self.bundle}: {self.graph} ({self.precision}), {self.sides[1]} compared with {self.sides[0]}",
            f"inputs: {self.inputs}; {len(self.rows)} tensors; limit: {self.limit_db:.1f} dB",
        ]
        first = self.first
        if first is None:
            lines += ["  worst tensors:", *(f"  {row.as_text()}" for row in sorted(self.rows, key=_ratio)[:after])]
            return "\n".join([*lines, "passed: no tensor drifts"])
        index = self.rows.index(first)
        lines += [f"  {row.as_text()}" for row in self.rows[max(index - before, 0) : index + after]]
        drifting = sum(row.drifts for row in self.rows)
        lines += [
            f"{drifting} of {len(self.rows)} tensors drift. The first one:",
            f"  tensor: {first.origin.tensor}",
            f"  node:   {first.origin.node} ({first.origin.operator})",
            f"  layer:  {first.origin.layer or 'inputs'}",
            f"  place:  {first.origin.place}",
        ]
        if self.reproducer is not None:
            lines += [f"  saved:  {self.reproducer.folder} ({self.reproducer.nodes} nodes{_verdict(self.reproducer)})"]
            lines += [f"  run:    {self.reproducer.command}"]
        return "\n".join([*lines, "NOT passed"])


def _verdict(reproducer: Reproducer) -> str:
    if reproducer.reproduces:
        return f"; on its own it misses the limit with {reproducer.snr_db:.1f} dB"
    return f"; on its own it has {reproducer.snr_db:.1f} dB, so errors of earlier layers add up here"


def _ratio(row: TensorRow) -> float:
    return row.snr_db if math.isfinite(row.snr_db) else math.copysign(math.inf, row.snr_db)
