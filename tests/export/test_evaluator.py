"""The storage evaluator rounds as a GPU in half precision does, and the range meter finds the largest values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper

from sana_export.export.evaluator import RangeMeter, StorageEvaluator, TensorEvaluator
from sana_export.export.evaluator_graphs import typed_model, weights_when_needed


class Overflowing(torch.nn.Module):
    """(x * 1000) / 1000, which is x unless 1000 x exceeds the range."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x.half() * 1000.0) * 0.001).float()


class Chain(torch.nn.Module):
    """Element-wise steps that every implementation of half precision rounds the same way."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, generator=torch.Generator().manual_seed(3)).to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.to(self.weight.dtype) * self.weight
        y = torch.cat([y + 0.3, y - x.to(y.dtype)], dim=-1).transpose(0, 1)
        return (y * y).relu().float()


def export(module: torch.nn.Module, path: Path, columns: int = 16) -> Path:
    torch.onnx.export(module, (torch.randn(4, columns),), path, dynamo=True, input_names=["x"], output_names=["y"], verbose=False)
    return path


def test_overflow_is_visible_although_onnxruntime_hides_it(tmp_path):
    path = export(Overflowing(), tmp_path / "model.onnx")
    x = np.full((4, 16), 100.0, dtype=np.float32)
    hidden = onnxruntime.InferenceSession(path).run(None, {"x": x})[0]
    assert np.isfinite(hidden).all(), "if ONNX Runtime no longer hides the overflow, the evaluator may be unnecessary"
    assert np.isinf(StorageEvaluator(path).run({"x": x})["y"]).all()
    assert np.isinf(Overflowing()(torch.from_numpy(x)).numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_step_is_rounded_as_torch_rounds_it(tmp_path, dtype):
    module = Chain(dtype).eval()
    path = export(module, tmp_path / "model.onnx")
    x = torch.randn(4, 16)
    with torch.no_grad():
        wanted = module(x).numpy()
        wide = Chain(torch.float32)
        wide.weight.data = module.weight.data.float()
        unrounded = wide(x).numpy()
    found = StorageEvaluator(path).run({"x": x.numpy()})["y"]
    assert np.array_equal(found, wanted)
    assert not np.array_equal(found, unrounded)


def test_half_outputs_have_their_declared_dtype(tmp_path):
    class Half(torch.nn.Module):
        def forward(self, x):
            return x.half() * 3.0

    path = export(Half(), tmp_path / "model.onnx")
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    found = StorageEvaluator(path).run({"x": x})["y"]
    assert found.dtype == np.float16
    assert np.array_equal(found, x.astype(np.float16) * np.float16(3.0))


def test_nan_counts_as_an_overflow(tmp_path):
    path = export(Overflowing(), tmp_path / "model.onnx")
    meter = RangeMeter(path)
    x = np.ones((4, 16), dtype=np.float32)
    x[2, 3] = np.nan
    meter.run({"x": x})
    assert meter.ranges()[0].headroom == 0.0


def test_magnitudes_beyond_the_dtypes_range_are_measured(tmp_path):
    path = export(Overflowing(), tmp_path / "model.onnx")
    meter = RangeMeter(path)
    meter.run({"x": np.full((4, 16), 100.0, dtype=np.float32)})
    meter.run({"x": np.full((4, 16), -3.0, dtype=np.float32)})
    worst = meter.ranges()[0]
    assert worst.largest == pytest.approx(1e5)
    assert worst.headroom == pytest.approx(0.65504)
    assert worst.dtype == "float16"


@pytest.mark.parametrize("module", [Overflowing(), torch.nn.Linear(16, 4)], ids=["fp16", "fp32"])
@pytest.mark.parametrize(("threads", "found"), [(None, 0), (2, 2)])
def test_the_session_gets_the_threads(tmp_path, monkeypatch, module, threads, found):
    sessions = []

    class Recorded(onnxruntime.InferenceSession):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            sessions.append(self)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorded)
    path = export(module, tmp_path / "model.onnx")
    evaluators = [StorageEvaluator] if isinstance(module, torch.nn.Linear) else [StorageEvaluator, RangeMeter]
    sessions.clear()
    for evaluator in evaluators:
        evaluator(path, threads=threads)
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [found] * len(evaluators)


def test_chosen_tensors_in_each_arithmetic(tmp_path):
    """x = 100: the product 1e5 is finite in float32, infinite if it is stored, and ONNX Runtime hides that from the next node."""
    path = export(Overflowing(), tmp_path / "model.onnx")
    product, quotient = (node.output[0] for node in typed_model(path).graph.node if node.op_type == "Mul")
    feeds = {"x": np.full((4, 16), 100.0, np.float32)}
    found = {
        name: [value[0, 0] for value in TensorEvaluator(path, [quotient, product], arithmetic=name).run(feeds).values()]
        for name in ("float32", "stored", "native")
    }
    assert found["float32"] == pytest.approx([100.0, 1e5], rel=1e-3)
    assert found["stored"] == [np.inf, np.inf]
    assert found["native"] == pytest.approx([100.0, np.inf], rel=1e-3)
    one = TensorEvaluator(path, [product], arithmetic="native").run(feeds)
    assert [(name, value.dtype, value.shape) for name, value in one.items()] == [(product, np.float32, (4, 16))]
    shapes = TensorEvaluator(path, [quotient, product], arithmetic="stored", shapes=True).run(feeds)
    assert {name: value.tolist() for name, value in shapes.items()} == {quotient: [4, 16], product: [4, 16]}


def test_weights_are_computed_right_before_their_first_reader():
    """And what several layers read, once. All weights at the start of the file would all be in memory at the same time."""
    weights = [helper.make_node("DequantizeLinear", [f"q{layer}", f"s{layer}"], [f"w{layer}"]) for layer in range(3)]
    turned = helper.make_node("Transpose", ["w1"], ["w1t"])
    layers = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("MatMul", ["a", "w1t"], ["b"]),
        helper.make_node("Add", ["b", "w0"], ["c"]),
        helper.make_node("MatMul", ["c", "w2"], ["y"]),
    ]
    names = {f"{kind}{layer}" for kind in "qs" for layer in range(3)}
    ordered = weights_when_needed([*weights, turned, *layers], names)
    assert [node.output[0] for node in ordered] == ["w0", "a", "w1", "w1t", "b", "c", "w2", "y"]
