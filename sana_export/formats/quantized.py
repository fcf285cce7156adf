"""Quantized weights as arrays: integers, scales, and the numbers that they stand for. The arithmetic is that of ONNX's
`DequantizeLinear` without zero points: integer times scale, in float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Array, Bytes, Float32

#: The number of each stored type in onnx.TensorProto.DataType.
ONNX_TYPES = {"int8": 3, "int4": 22, "fp8": 17}
#: The largest FP8 number (E4M3).
FP8_MAX = 448.0
#: A configuration entry of ONNX Runtime's sessions. By default it rounds the activations before 4-bit weights to 8 bits; with this
#: entry it computes in float32.
UNROUNDED_ACTIVATIONS = ("session.qdq_matmulnbits_accuracy_level", "1")
#: The same: weights are dequantized when the session is created. By default it dequantizes them in every run, which on a CPU takes
#: 1.1 to 1.4 times as long.
DEQUANTIZED_ONCE = ("session.disable_quant_qdq", "1")


def pack(values: npt.NDArray[np.int8], dtype: str) -> Bytes:
    """`values` as they are stored: int4 two to a byte, the first one in the lower half."""
    flat = np.ascontiguousarray(values).reshape(-1)
    if dtype != "int4":
        return flat.view(np.uint8)
    halves: Bytes = np.append(flat, np.zeros(flat.size % 2, np.int8)).view(np.uint8)
    return (halves[0::2] & np.uint8(0xF)) | (halves[1::2] << np.uint8(4))


def unpack(stored: Bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[np.int8] | Float32:
    """The numbers that `stored` bytes stand for before their scales: the inverse of `pack`, or FP8 numbers."""
    if dtype == "int8":
        return stored.view(np.int8).reshape(shape)
    if dtype == "fp8":
        return decode_fp8(stored.view(np.int8)).reshape(shape)
    halves = np.stack([stored << 4, stored & 0xF0], axis=-1).reshape(-1).view(np.int8) >> 4
    return halves[: int(np.prod(shape))].reshape(shape)


def decode_fp8(codes: npt.NDArray[np.int8]) -> Float32:
    """The FP8 numbers (E4M3, arXiv 2209.05433) with the bits `codes`: sign, 4 bits of exponent, 3 of mantissa; the last is NaN."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> 3) & 15, bits & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    numbers = np.where(bits < 128, size, -size)
    numbers[[0x7F, 0xFF]] = np.nan
    decoded: Float32 = numbers.astype(np.float32)[codes.view(np.uint8)]
    return decoded


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
