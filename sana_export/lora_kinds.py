"""The kinds of adapters in LoRA files: what each adds to a weight W [out, in], flattened from [out, in, kh, kw].

| kind | W becomes | source |
|---|---|---|
| LoRA | W + f B A | arXiv 2106.09685 |
| LoHa | W + f (w1_a w1_b) * (w2_a w2_b), element by element | arXiv 2108.06098 |
| LoKr | W + f (w1 kron w2), where w1 and w2 may be products as well | arXiv 2309.14859 |
| differences | W + f D | |
| DoRA | m V / |V|, where V is W with one of the first three | arXiv 2402.09353 |

f is the adapter's scale times alpha / r. Everything is computed in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sana_export.formats.arrays import Float32
from sana_export.formats.safetensors_file import StoredTensor

#: LyCORIS adds this to norms, so that it never divides by 0.
_EPSILON = np.finfo(np.float32).eps


def matrix(tensor: StoredTensor) -> Float32:
    """The tensor's values, read now, as a matrix [n, everything else]."""
    return np.asarray(tensor.read(), np.float32).reshape(tensor.shape[0], -1)


@dataclass(frozen=True, eq=False)
class Delta(ABC):
    """What an adapter adds to a weight, whatever the weight is. Tensors are read when they are needed."""

    #: The tensors by their roles.
    tensors: Mapping[str, StoredTensor]
    #: The factor on it.
    factor: float

    def product(self, rows: slice) -> Float32:
        """These rows of it, [rows, in * kh * kw], times the factor."""
        with np.errstate(over="ignore", invalid="ignore"):  # the caller finds values that are not finite
            product: Float32 = self._rows(rows) * np.float32(self.factor)
        return product

    @abstractmethod
    def _rows(self, rows: slice) -> Float32:
        """These rows of it, without the factor."""


class LowRank(Delta):
    """up down, with up [out, r] and down [r, in]."""

    def _rows(self, rows: slice) -> Float32:
        return matrix(self.tensors["up"])[rows] @ matrix(self.tensors["down"])


class Hadamard(Delta):
    """The products of two pairs of matrices, multiplied element by element."""

    def _rows(self, rows: slice) -> Float32:
        first, second = (
            matrix(self.tensors[f"hada_w{index}_a"])[rows] @ matrix(self.tensors[f"hada_w{index}_b"]) for index in (1, 2)
        )
        product: Float32 = first * second
        return product


class Kronecker(Delta):
    """The Kronecker product of w1 [a, c] and w2 [b, d], each as it is or as a product of two matrices."""

    def _rows(self, rows: slice) -> Float32:
        first, second = self._part("lokr_w1"), self._part("lokr_w2")
        start, stop, _ = rows.indices(len(first) * len(second))
        # Row i of the product is row i // b of w1 and row i % b of w2, so these rows of w1 are enough.
        above = start // len(second)
        product = np.kron(first[above : -(-stop // len(second))], second)
        return product[start - above * len(second) : stop - above * len(second)]

    def _part(self, name: str) -> Float32:
        if name in self.tensors:
            return matrix(self.tensors[name])
        product: Float32 = matrix(self.tensors[f"{name}_a"]) @ matrix(self.tensors[f"{name}_b"])
        return product


class Difference(Delta):
    """A difference between two whole weights."""

    def _rows(self, rows: slice) -> Float32:
        return matrix(self.tensors["diff"])[rows]


@dataclass(frozen=True, eq=False)
class Magnitude(ABC):
    """The trained norms of a DoRA: of the rows of a weight, or of its columns."""

    #: One norm for each row or column.
    values: StoredTensor
    #: Whether they are those of the rows, one for each output.
    of_rows: bool

    def decomposed(self, weight: Float32, rows: slice, epsilon: float) -> Float32:
        """The factors that give `weight` these norms, [rows, 1] or [1, in]. `rows` are those of the layer in `values`."""
        values = matrix(self.values).reshape(-1).astype(np.float64)
        norms = np.sqrt(np.einsum("ij,ij->i" if self.of_rows else "ij,ij->j", weight, weight, dtype=np.float64)) + epsilon
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = ((values[rows] if self.of_rows else values) / norms).astype(np.float32)
        return factors[:, None] if self.of_rows else factors[None, :]

    @abstractmethod
    def apply(self, weight: Float32, base: Float32, delta: Float32, rows: slice) -> Float32:
        """`weight`, which may have other adapters already, with this one. `base` is the weight without any adapter."""


@dataclass(frozen=True, eq=False)
class PeftMagnitude(Magnitude):
    """As PEFT computes it: the scale is a factor on `delta`, and the norm is that of the base weight with `delta`."""

    def apply(self, weight: Float32, base: Float32, delta: Float32, rows: slice) -> Float32:
        result: Float32 = self.decomposed(base + delta, rows, 0.0) * (weight + delta)
        return result


@dataclass(frozen=True, eq=False)
class LycorisMagnitude(Magnitude):
    """As LyCORIS and OneTrainer train it. The scale is a factor on the whole change of the weight."""

    #: The adapter's scale.
    scale: float

    def apply(self, weight: Float32, base: Float32, delta: Float32, rows: slice) -> Float32:
        changed = base + delta
        changed *= self.decomposed(changed, rows, float(_EPSILON))
        result: Float32 = weight + np.float32(self.scale) * (changed - base)
        return result


@dataclass(frozen=True, eq=False)
class Fold:
    """What one adapter does to one layer's weight."""

    #: What it adds, for all layers that it was trained on as one.
    delta: Delta
    #: The rows of `delta` that are the layer's.
    rows: slice
    #: The norms that the result gets, for a DoRA.
    magnitude: Magnitude | None = None

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the weight."""
        return self.magnitude is not None

    def product(self, rows: slice = slice(None)) -> Float32:
        """These rows of what it adds, [rows, in * kh * kw], before norms."""
        start, stop, _ = rows.indices(self.rows.stop - self.rows.start)
        return self.delta.product(slice(self.rows.start + start, self.rows.start + stop))

    def apply(self, weight: Float32, base: Float32) -> Float32:
        """`weight` [out, in * kh * kw] with it. `base` is the layer's weight without any adapter."""
        with np.errstate(over="ignore", invalid="ignore"):  # the caller finds values that are not finite
            product = self.product()
            if self.magnitude is not None:
                return self.magnitude.apply(weight, base, product, self.rows)
            product += weight
        return product


def folded(base: Float32, folds: Sequence[Fold]) -> Float32:
    """The weight `base` [out, in * kh * kw] with all of `folds`, in their order."""
    weight = base
    for fold in folds:
        weight = fold.apply(weight, base)
    return weight
