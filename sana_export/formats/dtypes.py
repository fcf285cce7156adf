"""The dtypes of tensors, with the name and the number that each file format and library has for them.

numpy has no bfloat16. Its values are stored as their bits in uint16, and `widen` and `round` convert them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sana_export.formats.arrays import Array, Float32


@dataclass(frozen=True)
class DType:
    """One dtype."""

    #: The contract's name, which is also torch's.
    name: str
    #: Bytes of one value.
    bytes: int
    #: The numpy dtype that its values are stored as, little-endian.
    numpy: str
    #: The name in a safetensors header.
    safetensors: str
    #: The number in onnx.TensorProto.DataType.
    onnx: int
    #: The name in tensorrt.DataType.
    tensorrt: str
    #: Whether it is a floating-point type. Weights are stored in one of these.
    floating: bool = False

    def widen(self, stored: Array) -> Float32:
        """`stored` values of this floating-point dtype as float32."""
        return widen_bfloat16(stored) if self.name == "bfloat16" else stored.astype(np.float32, copy=False)

    def round(self, values: Float32) -> Array:
        """The values of this floating-point dtype nearest to `values`, as they are stored."""
        return round_to_bfloat16(values) if self.name == "bfloat16" else values.astype(self.numpy, copy=False)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("float32", 4, "<f4", "F32", 1, "FLOAT", floating=True),
        DType("float16", 2, "<f2", "F16", 10, "HALF", floating=True),
        DType("bfloat16", 2, "<u2", "BF16", 16, "BF16", floating=True),
        DType("int64", 8, "<i8", "I64", 7, "INT64"),
        DType("int32", 4, "<i4", "I32", 6, "INT32"),
        DType("int8", 1, "|i1", "I8", 3, "INT8"),
        DType("uint8", 1, "|u1", "U8", 2, "UINT8"),
        DType("bool", 1, "|b1", "BOOL", 9, "BOOL"),
    )
}
BY_SAFETENSORS: dict[str, DType] = {dtype.safetensors: dtype for dtype in DTYPES.values()}
#: The dtypes that weights can be stored in, by the contract's name and by the name in a safetensors header.
WEIGHT_DTYPES = {name: dtype for name, dtype in DTYPES.items() if dtype.floating}
SAFETENSORS_WEIGHT_DTYPES = {name: dtype for name, dtype in BY_SAFETENSORS.items() if dtype.floating}


def widen_bfloat16(bits: Array) -> Float32:
    """The float32 values of bfloat16 `bits` (uint16): bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bfloat16(values: Float32) -> npt.NDArray[np.uint16]:
    """The bits of the bfloat16 numbers nearest to float32 `values`. Ties go to the number whose last bit is 0."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    carry = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + carry) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)  # the carry turns some NaNs into numbers
