"""The work of a graph: operations and bytes of its products, and the least time that they take at given rates.

A product is a matrix product or a convolution. Its FLOP are multiplications and additions; its bytes are its operands, read once,
and its result, written once. Everything else (norms, activations, residuals, layouts) counts as free, as if it were fused into the
products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Whose work is counted: that of the bundle's graphs, or that of diffusers' modules.
BUNDLE, REFERENCE = "bundle", "reference"


@dataclass(frozen=True)
class Rates:
    """The ceiling of a machine."""

    #: FLOP per second of matrix products.
    flop: float
    #: Bytes per second that a copy reads and writes.
    bytes: float
    #: Precision of the products.
    precision: str
    #: Where the rates come from.
    source: str

    def as_json(self) -> dict[str, Any]:
        return {
            "matmul_tflops": self.flop / 1e12,
            "copy_gbs": self.bytes / 1e9,
            "precision": self.precision,
            "source": self.source,
        }


@dataclass(frozen=True)
class Product:
    """One matrix product or convolution."""

    #: Name of the node, or "".
    name: str
    #: Name of the operator.
    operator: str
    #: Multiplications and additions.
    flop: int
    #: Bytes of the operands and the result as they are stored: half precision counts two bytes per number.
    bytes: int


@dataclass(frozen=True)
class Work:
    """The products of one or more runs of a graph."""

    #: FLOP of all products.
    flop: int = 0
    #: Bytes of all products.
    bytes: int = 0
    #: (FLOP, bytes) of a product to the number of products with these values.
    products: Mapping[tuple[int, int], int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, products: Iterable[Product]) -> Work:
        return sum((cls(item.flop, item.bytes, {(item.flop, item.bytes): 1}) for item in products), cls())

    def __add__(self, other: Work) -> Work:
        products = dict(self.products)
        for key, count in other.products.items():
            products[key] = products.get(key, 0) + count
        return Work(self.flop + other.flop, self.bytes + other.bytes, products)

    def __mul__(self, count: int) -> Work:
        return Work(self.flop * count, self.bytes * count, {key: count * times for key, times in self.products.items()})

    def floor_seconds(self, rates: Rates) -> float:
        """The least time at `rates`. Each product takes as long as its operations or its bytes, whichever is longer.

        Kernels that keep one product's result on the chip for the next product could be faster.
        """
        return sum(count * max(flop / rates.flop, size / rates.bytes) for (flop, size), count in self.products.items())


@dataclass(frozen=True)
class Achieved:
    """The rates that a measured run of some `Work` achieved."""

    #: TFLOP per second.
    tflops: float
    #: GB per second.
    gbs: float
    #: The least time of the work in ms.
    floor_ms: float
    #: The least time divided by the measured time. At most 1 if the rates are the true ceiling.
    share: float

    @classmethod
    def of(cls, work: Work, rates: Rates, milliseconds: float) -> Achieved:
        floor, seconds = work.floor_seconds(rates), milliseconds / 1e3
        return cls(work.flop / seconds / 1e12, work.bytes / seconds / 1e9, floor * 1e3, floor / seconds)
