"""Exported denoisers with rounded inputs, factors and branches: what the file contains and what it computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from sana_export.calibration.run import Calibration, calibrate
from sana_export.errors import ParityError
from sana_export.export.graph_files import export_graphs
from sana_export.export.quantize import weights as weights_module
from sana_export.export.quantize.plan import plan_weights
from sana_export.export.quantize.statistics import CalibrationFile
from sana_export.formats.quantized import FP8_MAX
from sana_export.graphs.builders import build_graph, shape_graph
from sana_export.manifest import GraphEntry, Options, QuantizedWeight
from tests.support.quantized import read_weights

#: Scheme and method. The last one has every step.
KINDS = {
    "int8": ("int8", ()),
    "fp8": ("fp8", ("ranges=mse",)),
    "int4": ("int4-weight", ("rescale", "gptq", "low-rank=4")),
}


@pytest.fixture(scope="module")
def calibration(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> CalibrationFile:
    path = tmp_path_factory.mktemp("calibration") / "measured.safetensors"
    drawn = Calibration(prompts=["a red apple", "a cat on a wall"], steps=2, rows=128)
    return calibrate(tiny_checkpoint, path, drawn, parts=("text_encoder", "denoiser"), precision="fp32")


class Exported:
    """One exported denoiser."""

    def __init__(self, folder: Path, kind: str, checkpoint: Any, calibration: CalibrationFile) -> None:
        scheme, method = KINDS[kind]
        self.options = Options("fp32", False, (1,), quantize={"denoiser": scheme}, quantize_method=method)
        self.checkpoint, self.folder = checkpoint, folder
        self.entry: GraphEntry = export_graphs("denoiser", ["denoiser"], checkpoint, self.options, folder, calibration)["denoiser"]
        self.path = folder / self.entry.onnx.path
        self.model = onnx.load(self.path)
        self.tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.module = build_graph("denoiser", checkpoint, replace(self.options, quantize={}))

    def array(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self.tensors[name]).astype(np.float64)


@pytest.fixture(scope="module", params=KINDS)
def exported(
    request: Any, tiny_checkpoint: Any, calibration: CalibrationFile, tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    return Exported(tmp_path_factory.mktemp(request.param), request.param, tiny_checkpoint, calibration)


def reconstructed(exported: Exported, weight: QuantizedWeight) -> np.ndarray:
    """The weight [in, out] that a layer has without its rounding and its factors: W' + down up."""
    if weight.dtype == "fp8":
        codes = exported.tensors[f"{weight.name}.quantized"]
        numbers = numpy_helper.to_array(codes).astype(np.float64) * exported.array(f"{weight.name}.scale")
    else:
        numbers, _ = read_weights(exported.path)[weight.name]
    if weight.rank:
        numbers = numbers + exported.array(f"{weight.name}.low_rank.down") @ exported.array(f"{weight.name}.low_rank.up")
    return numbers


def of_checkpoint(exported: Exported, weight: QuantizedWeight) -> np.ndarray:
    """The checkpoint's weight, [in, out]."""
    numbers: np.ndarray = exported.module.get_parameter(weight.name).data.double().numpy()
    return numbers.reshape(len(numbers), -1).T if weight.transposed else numbers


def input_factor(exported: Exported, weight: QuantizedWeight) -> np.ndarray:
    """What the layer's inputs are multiplied by, [in] or [1]: by itself, or by the layer before."""
    if weight.rescaled:
        return exported.array(f"{weight.name}.input.factor").ravel()
    if weight.name.endswith(".out.weight"):
        return output_factor(exported, weight.name.replace(".out.weight", ".qkv"))[-weight.shape[0] :]
    return np.ones(1)


def output_factor(exported: Exported, qkv: str) -> np.ndarray:
    """How many times as large as the checkpoint's the output channels of a weight of q, k, v are, [3 * C]."""
    weight = next(weight for weight in exported.entry.quantized if weight.name == qkv)
    wanted = of_checkpoint(exported, weight)
    found = reconstructed(exported, weight) * input_factor(exported, weight)[:, None]
    return (found * wanted).sum(axis=0) / np.square(wanted).sum(axis=0)


def test_every_layer_stands_for_the_checkpoints_weight(exported: Exported) -> None:
    """Up to rounding, whatever was divided or taken out. An error in a factor or a branch would be as large as the weight."""
    limit = {"int8": 0.012, "fp8": 0.04, "int4": 0.2}
    for weight in exported.entry.quantized:
        wanted = of_checkpoint(exported, weight)
        found = reconstructed(exported, weight) * input_factor(exported, weight)[:, None]
        if weight.name.endswith(".qkv"):
            found /= output_factor(exported, weight.name)
        error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 0 < error < limit[weight.dtype], weight.name


def test_only_the_channels_of_v_have_factors_of_the_layer_after(exported: Exported) -> None:
    """The others keep the checkpoint's size, up to rounding."""
    for block in ("blocks.0", "blocks.1"):
        query, key, value = np.split(output_factor(exported, f"{block}.qkv"), 3)
        np.testing.assert_allclose(np.concatenate([query, key]), 1, atol=0.05)
        assert (np.abs(value - 1) > 0.1).any() == (exported.options.scheme("denoiser") != "fp8")
        assert not next(weight for weight in exported.entry.quantized if weight.name == f"{block}.out.weight").rescaled


def test_only_the_residual_stream_is_multiplied_as_a_whole(exported: Exported) -> None:
    """All other factors are multiplied to smaller tensors."""
    products = [node for node in exported.model.graph.node if node.op_type == "Mul" and node.input[1].endswith(".input.factor")]
    whole = {node.input[1].removesuffix(".input.factor") for node in products if node.output[0].endswith(".multiplied")}
    rescaled = {weight.name for weight in exported.entry.quantized if weight.rescaled}
    assert whole == {name for name in rescaled if "cross_query" in name}
    assert bool(rescaled - whole) == (exported.options.scheme("denoiser") != "fp8")


def test_the_manifest_says_what_the_file_has(exported: Exported) -> None:
    scheme = exported.options.scheme("denoiser")
    planned = plan_weights(shape_graph("denoiser", exported.checkpoint, exported.options), "denoiser", exported.options)
    assert [weight.name for weight in exported.entry.quantized] == list(planned)
    kinds = [node.op_type for node in exported.model.graph.node]
    rounding = [weight for weight in exported.entry.quantized if weight.inputs]
    assert kinds.count("QuantizeLinear") == len(rounding) == (0 if scheme == "int4-weight" else 18)
    assert any(weight.rescaled for weight in exported.entry.quantized) == (scheme != "fp8")
    assert {weight.rank for weight in exported.entry.quantized} == ({4} if scheme == "int4-weight" else {0})
    moved = {"int8": [weight for weight in rounding if weight.rescaled], "fp8": [], "int4-weight": exported.entry.quantized}
    assert {weight.name for weight in exported.entry.quantized if not weight.nearest} >= {weight.name for weight in moved[scheme]}
    assert scheme == "int4-weight" or all(weight.nearest for weight in exported.entry.quantized if not weight.inputs)
    for weight in rounding:  # the layer whose input is a gated product keeps it whole
        assert not weight.name.endswith("point.weight")
        assert exported.array(f"{weight.name}.input.scale") > 0


def test_ranges_contain_what_was_seen(exported: Exported, calibration: CalibrationFile) -> None:
    for weight in exported.entry.quantized:
        if weight.inputs != "int8":
            continue
        seen = calibration.inputs("denoiser", weight.name)
        assert seen is not None
        reach = 127 * exported.array(f"{weight.name}.input.scale")
        assert reach >= (seen.maximum * input_factor(exported, weight)).max() * 0.9999, weight.name


def test_onnx_runtime_takes_integer_kernels_for_every_rounded_layer(exported: Exported, tmp_path: Path) -> None:
    rounding = sum(weight.inputs == "int8" for weight in exported.entry.quantized)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(exported.path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    assert [node.op_type for node in optimized.graph.node].count("MatMulIntegerToFloat") == rounding


def test_the_export_checks_the_rounding(
    tiny_checkpoint: Any, calibration: CalibrationFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module whose inputs are rounded in other steps than the file's."""
    form = weights_module.product_form
    monkeypatch.setattr(
        weights_module,
        "product_form",
        lambda weight, tensors, dtype: form(weight, {**tensors, "input.scale": tensors["scale"][0] * 20}, dtype),
    )
    with pytest.raises(ParityError, match="differs on random inputs"):
        Exported(tmp_path, "fp8", tiny_checkpoint, calibration)


def test_fp8_numbers_use_the_whole_range(tiny_checkpoint: Any, calibration: CalibrationFile, tmp_path: Path) -> None:
    exported = Exported(tmp_path, "fp8", tiny_checkpoint, calibration)
    for weight in exported.entry.quantized:
        if weight.dtype == "fp8":
            largest = np.abs(numpy_helper.to_array(exported.tensors[f"{weight.name}.quantized"]).astype(np.float64)).max(axis=0)
            assert (largest == FP8_MAX).all(), weight.name
