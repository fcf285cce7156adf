"""Quantized weights as arrays: integers, scales, and the numbers that they stand for. The arithmetic is that of ONNX's
`DequantizeLinear` without zero points: integer times scale, in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Array, Bytes, Float32
from sana_export.formats.dtypes import DType

#: The number of each stored type in onnx.TensorProto.DataType.
ONNX_TYPES = {"int8": 3, "int4": 22, "fp8": 17, "fp4": 23}
#: The types of which a byte holds two numbers.
_HALF_BYTES = ("int4", "fp4")
#: The largest FP8 number (E4M3).
FP8_MAX = 448.0
#: The FP4 numbers (E2M1, OCP Microscaling Formats 1.0) by their bits: sign, 2 bits of exponent, 1 of mantissa.
FP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_MAX = max(FP4_NUMBERS)
#: A configuration entry of ONNX Runtime's sessions. By default it rounds the activations before 4-bit weights to 8 bits; with this
#: entry it computes in float32.
UNROUNDED_ACTIVATIONS = ("session.qdq_matmulnbits_accuracy_level", "1")
#: The same: weights are dequantized when the session is created. By default it dequantizes them in every run, which on a CPU takes
#: 1.1 to 1.4 times as long.
DEQUANTIZED_ONCE = ("session.disable_quant_qdq", "1")


def pack(values: npt.NDArray[np.int8], dtype: str) -> Bytes:
    """`values`, integers or the bits of numbers, as they are stored: 4 bits two to a byte, the first one in the lower half."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if dtype not in _HALF_BYTES:
        return flat.view(np.uint8)
    halves: Bytes = np.append(flat, np.zeros(flat.size % 2, np.int8)).view(np.uint8)
    return (halves[0::2] & np.uint8(0xF)) | (halves[1::2] << np.uint8(4))


def unpack(stored: Bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.int8] | Float32:
    """The numbers that `stored` bytes stand for before their scales: the inverse of `pack`, or the numbers with these bits."""
    if dtype == "int8":
        return stored.view(np.int8).reshape(shape)
    if dtype == "fp8":
        return decode_fp8(stored.view(np.int8)).reshape(shape)
    halves = np.stack([stored << 4, stored & 0xF0], axis=-1).reshape(-1).view(np.int8) >> 4
    values = halves[: int(np.prod(shape))].reshape(shape)
    return decode_fp4(values) if dtype == "fp4" else values


def decode_fp8(codes: npt.NDArray[np.int8]) -> Float32:
    """The FP8 numbers (E4M3, arXiv 2209.05433) with the bits `codes`: sign, 4 bits of exponent, 3 of mantissa; the last is NaN."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    numbers = np.where(bits < 128, size, -size)
    numbers[[0x7F, 0xFF]] = np.nan
    decoded: Float32 = numbers.astype(np.float32)[codes.view(np.uint8)]
    return decoded


def decode_fp4(codes: npt.NDArray[np.int8]) -> Float32:
    """The FP4 numbers whose bits are the lower half of each of `codes`."""
    return np.array(FP4_NUMBERS, np.float32)[codes & 0xF]


def encode_fp4(numbers: Float32) -> npt.NDArray[np.int8]:
    """The bits of FP4 `numbers`, each in the lower half of a byte. Zero is positive."""
    bits = np.searchsorted(np.array(FP4_NUMBERS[:8], np.float32), np.abs(numbers))
    return (bits | np.where(numbers < 0, 8, 0)).astype(np.int8)


def widen_block_scales(codes: npt.NDArray[np.int8], tensor_scale: np.float32, dtype: DType) -> Float32:
    """The scales of blocks of FP4 numbers: the FP8 numbers with the bits `codes` times `tensor_scale`, in a graph's `dtype`."""
    return dtype.widen(dtype.round(decode_fp8(codes) * tensor_scale))


def scale_shape(shape: tuple[int, ...], axis: int, block: int) -> tuple[int, ...]:
    """The shape of the scales of an array: one for each index of `axis`, or one for each `block` along it."""
    return (*shape[:axis], shape[axis] // block, *shape[axis + 1 :]) if block else (shape[axis],)


def spread(scales: Array, dimensions: int, axis: int, block: int) -> Array:
    """`scales` in a shape that multiplies an array of so many dimensions."""
    return np.repeat(scales, block, axis=axis) if block else scales.reshape(-1, *[1] * (dimensions - axis - 1))


def dequantize(values: npt.NDArray[np.int8] | Float32, scales: Float32, axis: int, block: int) -> Float32:
    """The numbers that `values` stand for."""
    wide: Float32 = values.astype(np.float32) * spread(scales, values.ndim, axis, block)
    return wide


def as_stored(weight: Float32, transposed: bool) -> Float32:
    """A weight as a graph uses it, in the layout of its integers. `transposed`: as `QuantizedWeight.transposed`."""
    return weight.reshape(len(weight), -1).T if transposed else weight


def as_used(numbers: Float32, transposed: bool, shape: tuple[int, ...]) -> Float32:
    """The inverse of `as_stored` for a weight of `shape`, contiguous."""
    return np.ascontiguousarray(numbers.T if transposed else numbers).reshape(shape)
