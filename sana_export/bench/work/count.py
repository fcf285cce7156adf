"""What a graph has to do, counted: the operations and bytes of its products, and the least time that they take at given rates.

A product is a matrix product or a convolution. Its FLOP are multiplications and additions, its bytes are its operands read and its
result written once. All else (norms, activations, residuals, layouts) counts as free, as if it were fused into the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

#: Whose work a row does (image_work.py).
BUNDLE, REFERENCE = "bundle", "reference"


@dataclass(frozen=True)
class Rates:
    """What a machine can do: matrix products in FLOP a second in `precision`, and bytes read and written a second by a copy."""

    flop: float
    bytes: float
    precision: str
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
    """One product. `bytes` as stored: half precision counts two bytes a number."""

    name: str
    operator: str
    flop: int
    bytes: int


@dataclass(frozen=True)
class Work:
    """The products of one or several runs of a graph."""

    flop: int = 0
    bytes: int = 0
    #: FLOP and bytes of the products that are alike in both: the number of times they run.
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
        """The least time at `rates`: each product takes as long as its operations or its bytes, whichever takes longer.

        Kernels that keep the result of one product on the chip for the next one could be faster.
        """
        return sum(count * max(flop / rates.flop, size / rates.bytes) for (flop, size), count in self.products.items())


@dataclass(frozen=True)
class Achieved:
    """What a run of `Work` in some time came to; `share` is the floor by the time, at most 1 where the rates are the ceiling."""

    tflops: float
    gbs: float
    floor_ms: float
    share: float

    @classmethod
    def of(cls, work: Work, rates: Rates, milliseconds: float) -> Achieved:
        floor, seconds = work.floor_seconds(rates), milliseconds / 1e3
        return cls(work.flop / seconds / 1e12, work.bytes / seconds / 1e9, floor * 1e3, floor / seconds)
