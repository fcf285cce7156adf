"""The table of dtypes, compared with the libraries that it names."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file

from sana_export.formats.dtypes import BY_SAFETENSORS, DTYPES, SAFETENSORS_WEIGHT_DTYPES, WEIGHT_DTYPES, DType
from sana_export.formats.safetensors_file import TensorFile


@pytest.mark.parametrize("row", DTYPES.values(), ids=DTYPES)
def test_a_row_agrees_with_torch_numpy_safetensors_and_onnx(row: DType, tmp_path) -> None:
    theirs = getattr(torch, row.name)
    assert row.bytes == theirs.itemsize == np.dtype(row.numpy).itemsize
    assert row.floating == theirs.is_floating_point
    values = torch.tensor([0, 1, 1, 0]).to(theirs)
    save_file({"values": values}, tmp_path / "a.safetensors")
    stored = TensorFile(tmp_path / "a.safetensors")["values"]
    assert stored.dtype == row.safetensors
    assert stored.stored.dtype == np.dtype(row.numpy)
    assert stored.read().tolist() == values.tolist()
    assert row.onnx == TensorProto.DataType.Value({"float32": "FLOAT"}.get(row.name, row.name).upper())
    if row.name != "bfloat16":  # for which the onnx package has its own numpy dtype
        assert helper.np_dtype_to_tensor_dtype(np.dtype(row.numpy)) == row.onnx


def test_a_row_agrees_with_tensorrt() -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    for row in DTYPES.values():
        assert getattr(tensorrt.DataType, row.tensorrt).itemsize == row.bytes
        if row.name != "bfloat16":
            assert np.dtype(tensorrt.nptype(getattr(tensorrt.DataType, row.tensorrt))) == np.dtype(row.numpy)


def test_weights_are_floating_point() -> None:
    assert tuple(WEIGHT_DTYPES) == ("float32", "float16", "bfloat16")
    assert tuple(SAFETENSORS_WEIGHT_DTYPES) == ("F32", "F16", "BF16")
    assert len(BY_SAFETENSORS) == len(DTYPES)


@pytest.mark.parametrize("name", WEIGHT_DTYPES)
def test_values_are_rounded_and_widened_as_torch_does(name: str) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 3
    special = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1, 0x7F7FFFFF, 1], dtype=torch.int32).view(
        torch.float32
    )
    values = torch.cat([values, special])
    row, wanted = DTYPES[name], values.to(getattr(torch, name))
    with np.errstate(over="ignore"):
        stored = row.round(values.numpy())
    assert stored.dtype == np.dtype(row.numpy)
    assert np.array_equal(row.widen(stored), wanted.float().numpy(), equal_nan=True)
