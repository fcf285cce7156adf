"""The numbers that a quantized value can have at a scale of 1, and the scales of NVFP4."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Array, Float32
from sana_export.formats.dtypes import DType
from sana_export.formats.quantized import FP4_MAX, FP8_MAX, decode_fp8, encode_fp4, widen_block_scales


@dataclass(frozen=True)
class Grid:
    """The numbers of one type."""

    #: The largest one.
    most: float
    #: The nearest number to each value. Ties go to the number whose last bit is 0. Larger values saturate.
    round: Callable[[Float32], Float32]
    #: Its numbers as `formats.quantized.pack` takes them.
    encode: Callable[[Float32], npt.NDArray[np.int8]]
    #: The shares of the largest magnitude that a search of scales tries. The first one makes it the largest number.
    shares: tuple[float, ...] = tuple(1 - step / 40 for step in range(25))


def round_integers(values: Float32, most: float) -> Float32:
    """The nearest integers from -`most` to `most`: symmetric, so a value and its negative have the same error."""
    return np.rint(values).clip(-most, most)


def round_fp8(values: Float32) -> Float32:
    """The nearest numbers of FP8 E4M3 (arXiv 2209.05433), at most 448."""
    rounded: Float32 = values.clip(-FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return rounded


def round_fp4(values: Float32) -> Float32:
    """The nearest numbers of FP4 E2M1: the distance between two is 0.5 up to 2, 1 up to 4, then 2."""
    sizes = np.abs(values)
    steps = np.where(sizes < 2, np.float32(0.5), np.where(sizes < 4, np.float32(1), np.float32(2)))
    return (np.rint(values / steps) * steps).clip(-FP4_MAX, FP4_MAX)


def _encode_integers(numbers: Float32) -> npt.NDArray[np.int8]:
    return numbers.astype(np.int8)


def _encode_fp8(numbers: Float32) -> npt.NDArray[np.int8]:
    return numbers.astype(ml_dtypes.float8_e4m3fn).view(np.int8)


#: FP4 has no number between 4 and 6, so a block may have less error if its largest magnitude is 4 (arXiv 2512.02010).
GRIDS = {
    "int8": Grid(127, partial(round_integers, most=127), _encode_integers),
    "int4": Grid(7, partial(round_integers, most=7), _encode_integers),
    "fp8": Grid(FP8_MAX, round_fp8, _encode_fp8),
    "fp4": Grid(FP4_MAX, round_fp4, encode_fp4, shares=(1.0, *(1.5 - step / 20 for step in range(20) if step != 10))),
}


#: The least positive number of float16: the largest scale of a block is not less.
_LEAST_SCALE = 2.0**-24


class ScaleType(Protocol):
    """How scales are stored. A `DType` is one."""

    @property
    def bytes(self) -> int: ...

    @property
    def numpy(self) -> str: ...

    def widen(self, stored: Array) -> Float32: ...

    def round(self, values: Float32) -> Array: ...


@dataclass(frozen=True)
class BlockScales:
    """The scales of NVFP4: FP8 numbers (their bits) times one float32 number for the whole tensor, in the dtype of the graph."""

    tensor_scale: np.float32
    dtype: DType

    bytes = 1
    numpy = "|i1"

    @classmethod
    def of(cls, weight: Float32, dtype: DType) -> BlockScales:
        """Those whose largest FP8 number is for the largest magnitude of `weight`, with room for a scale 1.5 times as large."""
        largest = float(np.abs(weight).max())
        return cls(np.float32(max(1.5 * largest / (FP4_MAX * FP8_MAX), _LEAST_SCALE / FP8_MAX) if largest else 1.0), dtype)

    def widen(self, stored: Array) -> Float32:
        return widen_block_scales(stored, self.tensor_scale, self.dtype)

    def round(self, values: Float32) -> Array:
        """The nearest ones. None is zero."""
        codes = np.arange(1, 127, dtype=np.int8)
        least = decode_fp8(codes)[self.widen(codes) > 0][0]
        return _encode_fp8((values / self.tensor_scale).clip(least, FP8_MAX))
