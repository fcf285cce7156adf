"""The account of an engine: what each layer after fusion computes, reads and writes.

The layers are those that the builder lists (trt/layers.py). FLOP are counted from the ONNX file and belong to the layer that
computes the product's node. Bytes are those of the tensors that a layer is given, so a layer that reads a part of a tensor counts
as reading all of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_export.bench.work.count import Rates
from sana_export.bench.work.onnx import onnx_products
from sana_export.trt.layers import EngineLayer, LayerTensor

#: Operations that only move or convert numbers, by TensorRT's short names. A generated kernel of nothing else is a copy.
_MOVES = frozenset({"Move", "Resh", "Tran", "Slic", "Conc", "Repl", "Cast"})
_GENERATED = re.compile(r"__myl_(\w+?)_myl\d+_\d+")
#: What the exporter adds to the names of its operations.
_NODE_NAME = re.compile(r"node_|_\d+")


@dataclass(frozen=True)
class LayerCost:
    """What one layer needs, or several equal ones together."""

    #: How many layers these are.
    count: int
    #: "product", "copy" (a transposition, a cast, padding or a slice) or "other".
    role: str
    #: The fused operations: by TensorRT's short names, or for a kernel from a library the names of its ONNX nodes without numbers.
    operations: str
    #: FLOP of the matrix products and convolutions.
    flop: int
    #: Bytes of the activations that are read.
    read: int
    #: Bytes of the weights that are read.
    weights: int
    #: Bytes that are written.
    written: int
    #: Bytes of these that are float32.
    wide: int

    @property
    def bytes(self) -> int:
        return self.read + self.weights + self.written

    def seconds(self, rates: Rates) -> float:
        """The time of one layer at `rates`: that of its FLOP or of its bytes, whichever is longer."""
        return max(self.flop / rates.flop, self.bytes / rates.bytes)

    def __add__(self, other: LayerCost) -> LayerCost:
        """Both together, with the role and the operations of the first."""
        sums = ("count", "flop", "read", "weights", "written", "wide")
        return dataclasses.replace(self, **{name: getattr(self, name) + getattr(other, name) for name in sums})


@dataclass(frozen=True)
class Account:
    """The layers of the engine of one graph."""

    #: Name of the graph.
    graph: str
    #: Name of the profile.
    profile: str
    #: The sizes of its dynamic axes.
    sizes: Mapping[str, int]
    #: The cost of each layer, in the order in which they run.
    costs: tuple[LayerCost, ...]
    #: Role to the number of layers of the engine that accepts the whole ranges of the profile.
    in_profile: Mapping[str, int]

    def by_role(self) -> dict[str, LayerCost]:
        """Role to the cost of all layers with it, and "all" to that of all layers."""
        found: dict[str, LayerCost] = {}
        for cost in self.costs:
            for key in (cost.role, "all"):
                found[key] = found[key] + cost if key in found else cost
        return {role: found[role] for role in ROLES if role in found}

    def milliseconds(self, rates: Rates) -> dict[str, float]:
        """Role to the time of all layers with it at `rates`, and "all" to that of all layers, if they run one after the other."""
        return {
            role: 1e3 * sum(cost.seconds(rates) for cost in self.costs if role in (cost.role, "all")) for role in self.by_role()
        }

    def grouped(self) -> list[LayerCost]:
        """The costs with equal layers added up, in the order of each one's first layer."""
        found: dict[LayerCost, LayerCost] = {}
        for cost in self.costs:
            found[cost] = found[cost] + cost if cost in found else cost
        return list(found.values())

    def as_json(self, cards: Mapping[str, Rates]) -> dict[str, Any]:
        """The account, with the times at the rates of `cards`."""
        return {
            "graph": self.graph,
            "profile": self.profile,
            "sizes": dict(self.sizes),
            "layers": [dataclasses.asdict(cost) for cost in self.costs],
            "totals": {role: dataclasses.asdict(cost) for role, cost in self.by_role().items()},
            "in_profile": dict(self.in_profile),
            "ms": {card: self.milliseconds(rates) for card, rates in cards.items()},
        }

    def as_text(self, cards: Mapping[str, Rates]) -> str:
        """Markdown: a table by role with the times at the rates of `cards`, then one with a row for each group of equal layers."""
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.sizes.items())
        times = {card: self.milliseconds(rates) for card, rates in cards.items()}
        lines = [f"## {self.graph}", "", f"Profile {self.profile}: {sizes}.", ""]
        lines += [f"| layers | number | in the whole profile | {_AMOUNTS} | {' | '.join(f'{card}, ms' for card in cards)} |"]
        lines += [f"|---|{'---:|' * (7 + len(cards))}"]
        for role, cost in self.by_role().items():
            milliseconds = " | ".join(f"{times[card][role]:.2f}" for card in cards)
            lines.append(f"| {role} | {cost.count} | {self.in_profile.get(role, 0)} | {_amounts(cost)} | {milliseconds} |")
        lines += ["", f"| number | layer | operations | {_AMOUNTS} |", f"|---:|---|---|{'---:|' * 5}"]
        lines += [f"| {cost.count} | {cost.role} | {cost.operations} | {_amounts(cost)} |" for cost in self.grouped()]
        return "\n".join(lines)


#: The order of the roles in tables.
ROLES = ("product", "copy", "other", "all")


def make_account(
    graph: str, profile: str, onnx: Path, sizes: Mapping[str, int], layers: Sequence[EngineLayer], in_profile: Sequence[EngineLayer]
) -> Account:
    """The account of the graph in the file `onnx`.

    `layers` are those of its engine for `sizes` alone, `in_profile` those of its engine for the ranges of a profile. Raises
    ArtifactError if a size is missing.
    """
    products = {product.name: product.flop for product in onnx_products(onnx, sizes)}
    costs = tuple(map(_cost, layers, _flop_of(layers, products)))
    roles = [_role(layer, flop) for layer, flop in zip(in_profile, _flop_of(in_profile, products), strict=True)]
    return Account(graph, profile, sizes, costs, {role: roles.count(role) for role in set(roles)} | {"all": len(roles)})


def _flop_of(layers: Sequence[EngineLayer], products: Mapping[str, int]) -> list[int]:
    """The FLOP of each layer. A kernel that only prepares a product has the product's node too, so the last layer counts.

    Kernels from a library come before generated ones.
    """
    owners: dict[str, int] = {}
    for generated in (True, False):
        for index, layer in enumerate(layers):
            if bool(_GENERATED.fullmatch(layer.name) and layer.kind == "kgen") is generated:
                owners |= dict.fromkeys(layer.nodes, index)
    found = [0] * len(layers)
    for node, flop in products.items():
        if node in owners:
            found[owners[node]] += flop
    return found


def _cost(layer: EngineLayer, flop: int) -> LayerCost:
    return LayerCost(
        1,
        _role(layer, flop),
        _operations(layer),
        flop,
        _bytes(layer.inputs),
        _bytes(layer.constants),
        _bytes(layer.outputs),
        _bytes(tensor for tensor in layer.outputs if tensor.dtype == "Float"),
    )


def _role(layer: EngineLayer, flop: int) -> str:
    if flop:
        return "product"
    return "copy" if (found := _GENERATED.fullmatch(layer.name)) and set(_parts(found[1])) <= _MOVES else "other"


def _operations(layer: EngineLayer) -> str:
    found = _GENERATED.fullmatch(layer.name)
    return " ".join(_parts(found[1])) if found else " ".join(_NODE_NAME.sub("", node) for node in layer.nodes) or layer.name


def _parts(name: str) -> list[str]:
    """ "ReshTranMove" to "Resh", "Tran" and "Move"."""
    return re.findall(r"[A-Z][a-z0-9]*", name)


def _bytes(tensors: Iterable[LayerTensor]) -> int:
    return sum(tensor.bytes or 0 for tensor in tensors)


#: The heads of what `_amounts` writes.
_AMOUNTS = "GFLOP | MB read | MB of weights | MB written | of these float32"


def _amounts(cost: LayerCost) -> str:
    amounts = (cost.flop / 1e3, cost.read, cost.weights, cost.written, cost.wide)
    return " | ".join(f"{amount / 1e6:.1f}" for amount in amounts)
