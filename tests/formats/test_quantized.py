"""Quantized weights against a reading of ONNX's own specification in plain Python."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from sana_export.formats.quantized import ONNX_TYPES, as_stored, as_used, dequantize, pack, scale_shape, unpack


@pytest.mark.parametrize("shape", [(4, 6), (3, 5), (1, 1), (7,)])
def test_packed_4_bits_are_those_of_onnx(shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    packed = pack(values, "int4")
    tensor = onnx.TensorProto(data_type=ONNX_TYPES["int4"], dims=shape, raw_data=packed.tobytes())
    assert (numpy_helper.to_array(tensor).astype(np.int8) == values).all()
    assert (unpack(packed, "int4", shape) == values).all()
    assert packed.nbytes == (values.size + 1) // 2


def test_8_bits_are_stored_as_they_are() -> None:
    values = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    assert pack(values, "int8").tobytes() == values.tobytes()
    assert (unpack(pack(values, "int8"), "int8", (3, 4)) == values).all()


@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [((6, 4), 0, 0), ((6, 4), 1, 0), ((6, 4, 1, 1), 0, 0), ((64, 4), 0, 32), ((96, 5), 0, 32)],
)
def test_dequantization_is_that_of_onnx(shape: tuple[int, ...], axis: int, block: int) -> None:
    random = np.random.default_rng(1)
    values = random.integers(-7, 8, shape).astype(np.int8)
    scales = random.random(scale_shape(shape, axis, block)).astype(np.float32)
    attributes = {"axis": axis, **({"block_size": block} if block else {})}
    node = helper.make_node("DequantizeLinear", ["values", "scales"], ["numbers"], **attributes)
    inputs = [
        helper.make_tensor_value_info("values", onnx.TensorProto.INT8, shape),
        helper.make_tensor_value_info("scales", onnx.TensorProto.FLOAT, scales.shape),
    ]
    output = helper.make_tensor_value_info("numbers", onnx.TensorProto.FLOAT, shape)
    model = helper.make_model(helper.make_graph([node], "g", inputs, [output]), opset_imports=[helper.make_opsetid("", 21)])
    (wanted,) = ReferenceEvaluator(model).run(None, {"values": values, "scales": scales})
    assert (dequantize(values, scales, axis, block) == wanted).all()


def test_the_stored_layout_is_undone() -> None:
    kernel = np.random.default_rng(2).standard_normal((6, 4, 1, 1)).astype(np.float32)
    stored = as_stored(kernel, True)
    assert stored.shape == (4, 6)
    assert stored[1, 5] == kernel[5, 1, 0, 0]
    assert (as_used(stored, True, kernel.shape) == kernel).all()
    assert as_stored(kernel, False) is kernel
