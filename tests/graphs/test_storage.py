"""Weights in a file have the same values as in memory, are stored once if equal, and take little memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from sana_export.graphs.numerics import NUMERICS, Linear
from sana_export.graphs.storage import ALIGNMENT, WeightFile, stored_in

VALUES = {
    "matrix": torch.randn(300, 40),
    "half": torch.randn(17, 3).half(),
    "bfloat16": torch.randn(9).bfloat16(),
    "transposed": torch.randn(20, 30).T,
    "number": torch.tensor(2.5),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_kept_tensor_has_the_same_values(tmp_path, name):
    value = VALUES[name]
    with WeightFile(tmp_path / "data") as file:
        file.keep(torch.randn(3))
        kept = file.keep(value)
        place = file.place(kept)
    assert kept.dtype == value.dtype
    assert torch.equal(kept, value)
    assert place.offset % ALIGNMENT == 0
    stored = (tmp_path / "data").read_bytes()[place.offset : place.offset + place.length]
    assert stored == value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    file.release()
    assert torch.equal(kept, value)


def test_equal_tensors_are_written_once(tmp_path):
    value = torch.randn(5000)
    with WeightFile(tmp_path / "data") as file:
        first, second, other = file.keep(value), file.keep(value.clone()), file.keep(value + 1)
        assert file.place(first) == file.place(second) != file.place(other)
        assert file.bytes < 3 * value.nbytes
    assert file.place(value) is None


def test_a_graph_with_weights_in_a_file_computes_the_same(tmp_path):
    weight, bias, x = torch.randn(6, 5), torch.randn(6), torch.randn(2, 5)
    in_memory = Linear(weight, bias, NUMERICS["float32"], scale=0.5)
    with WeightFile(tmp_path / "data") as file, stored_in(file):
        in_file = Linear(weight, bias, NUMERICS["float32"], scale=0.5)
    assert file.place(in_file.weight) is not None
    assert file.place(in_memory.weight) is None
    assert torch.equal(in_file(x), in_memory(x))
    torch.testing.assert_close(in_memory(x), 0.5 * torch.nn.functional.linear(x, weight, bias))


def test_parameters_made_outside_stored_in_stay_in_memory(tmp_path):
    with WeightFile(tmp_path / "data") as file:
        with stored_in(file):
            pass
        Linear(torch.randn(6, 5), None, NUMERICS["float32"])
        assert file.bytes == 0


EXPORT_IN_A_CHILD = """
import resource, sys, torch
from pathlib import Path
from sana_export.contract import GraphSpec, TensorSpec
from sana_export.export.onnx import check_onnx, export_onnx
from sana_export.graphs.numerics import NUMERICS, Linear
from sana_export.graphs.storage import WeightFile, stored_in

spec = GraphSpec("deep", (TensorSpec("input", "float32", ("batch", 2048)),), (TensorSpec("y", "float32", ("batch", 2048)),))
with WeightFile(Path(sys.argv[1], "model.onnx.data")) as weights:
    def build(layers):
        with stored_in(weights):
            return torch.nn.Sequential(*(Linear(torch.randn(2048, 2048), None, NUMERICS["float32"]) for _ in range(layers)))
    path = Path(sys.argv[1], "model.onnx")
    export_onnx(build(1), spec, path, weights)  # the memory that any tracing needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    export_onnx(build(24), spec, path, weights)
    check_onnx(path, spec)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10, weights.bytes)
"""


def test_an_export_needs_less_memory_than_its_weights(tmp_path):
    run = subprocess.run([sys.executable, "-c", EXPORT_IN_A_CHILD, tmp_path], capture_output=True, text=True, check=True)
    grown, written = np.array(run.stdout.split()[-2:], dtype=np.int64)
    assert written == 25 * 4 * 2048 * 2048
    assert grown < 0.5 * written
