"""FP4 numbers, their two kinds of scales, and an exported file, against the onnx package's own FP4 and the libraries' rounding."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sana_export.bench.work.onnx import onnx_products
from sana_export.calibration.run import Calibration, calibrate
from sana_export.contract import DYNAMIC_AXES
from sana_export.errors import ArtifactError, ParityError
from sana_export.export.evaluator import StorageEvaluator, TensorEvaluator
from sana_export.export.example_inputs import CHECK_SIZES, random_inputs
from sana_export.export.graph_files import export_graphs
from sana_export.export.quantize import weights as weights_module
from sana_export.export.quantize.compensation import round_with_compensation
from sana_export.export.quantize.grids import GRIDS, BlockScales, round_fp4
from sana_export.export.quantize.layers import quantize_layers
from sana_export.export.quantize.ranges import quantized
from sana_export.export.quantize.rounding import round_to_nearest, round_with_search
from sana_export.export.quantize.statistics import CalibrationFile, LayerInputs
from sana_export.formats.dtypes import WEIGHT_DTYPES
from sana_export.formats.quantized import decode_fp4, encode_fp4, pack, unpack
from sana_export.graphs.products import ProductForm, rounded
from sana_export.manifest import Manifest, Options, QuantizedWeight
from sana_export.quantization.method import parse_method
from sana_export.runtime import SanaRuntime, backends
from sana_export.verify.bundle import Sampling
from sana_export.verify.evaluator_backend import open_runtime
from sana_export.verify.layers import LayerCheck, compare_layers
from sana_export.verify.quantized import check_stored

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
#: Every border between two FP4 numbers, the numbers themselves, and their neighbors.
BORDERS = np.float32([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 100])


class DynamicQuantize(OpRun):
    """TensorRT's operator as its documentation describes it, with the rounding of ml_dtypes."""

    op_domain = "trt"

    def _run(self, x: np.ndarray, scale: np.ndarray, axis: int, block_size: int, scale_type: int) -> tuple[np.ndarray, ...]:
        assert (axis, block_size, scale_type) == (-1, 16, onnx.TensorProto.FLOAT8E4M3FN)
        blocks = (x.astype(np.float32) / scale).reshape(*x.shape[:-1], -1, 16)
        scales = np.minimum(np.abs(blocks).max(axis=-1) / np.float32(6), 448).astype(FP8)
        wide = scales.astype(np.float32)[..., None]
        numbers = np.divide(blocks, wide, where=wide > 0, out=np.zeros_like(blocks)).clip(-6, 6)
        return numbers.astype(FP4).reshape(x.shape), scales


DynamicQuantize.__name__ = "TRT_FP4DynamicQuantize"


def test_fp4_is_that_of_the_library() -> None:
    near = np.concatenate([BORDERS, np.nextafter(BORDERS, np.float32(-1)), np.nextafter(BORDERS, np.float32(200))])
    values = np.concatenate([near, -near, np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 3])
    wanted = values.clip(-6, 6).astype(FP4)
    assert (round_fp4(values) == wanted.astype(np.float32)).all()
    codes = encode_fp4(round_fp4(values))
    assert (decode_fp4(codes) == wanted.astype(np.float32)).all()
    assert (codes[values > 0.3] == wanted.view(np.int8)[values > 0.3]).all()


def test_fp4_is_stored_as_onnx_stores_it() -> None:
    numbers = decode_fp4(np.arange(15, dtype=np.int8).reshape(5, 3))
    codes = encode_fp4(numbers)
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.FLOAT4E2M1, dims=(5, 3), raw_data=pack(codes, "fp4").tobytes())
    assert (numpy_helper.to_array(tensor).astype(np.float32) == numbers).all()
    assert (unpack(pack(codes, "fp4"), "fp4", (5, 3)) == numbers).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_are_the_nearest_multiples_of_their_scales(dtype: str) -> None:
    weight = np.random.default_rng(1).standard_t(3, (64, 20)).astype(np.float32) * np.float32(0.02)
    weight[16:32, 3] = 0  # a block of zeros
    weight[32:48, 4] *= 1e-6  # one whose exact scale is below FP8's smallest number
    scales = BlockScales.of(weight, WEIGHT_DTYPES[dtype])
    found = round_to_nearest(weight, "fp4", 0, 16, scales)
    stored = found.scales.view(FP8).astype(np.float32) * scales.tensor_scale
    wide = np.repeat(stored.astype(dtype).astype(np.float32), 16, axis=0)
    assert (wide > 0).all()
    assert (found.numbers == (weight / wide).clip(-6, 6).astype(FP4).astype(np.float32) * wide).all()
    largest = np.repeat(np.abs(weight.reshape(4, 16, 20)).max(axis=1), 16, axis=0)
    fits = largest > 1e-4
    assert (np.abs(6 * wide / largest - 1)[fits] < 2.0**-4 + 2.0**-8).all(), "a scale is the largest magnitude over 6 in FP8"
    assert np.isfinite(found.numbers).all()
    assert not found.numbers[16:32, 3].any()
    assert (np.abs(found.numbers - weight) <= np.maximum(wide, largest / 5)).all()


def test_a_nearly_dead_weight_has_scales_that_float16_can_hold() -> None:
    weight = np.random.default_rng(2).standard_normal((32, 4)).astype(np.float32) * np.float32(1e-8)
    scales = BlockScales.of(weight, WEIGHT_DTYPES["float16"])
    found = round_to_nearest(weight, "fp4", 0, 16, scales)
    assert (scales.widen(found.scales) > 0).all()
    assert np.abs(found.numbers).max() < 1e-6


@pytest.mark.parametrize("words", [["nearest"], ["ranges=mse"]])
def test_two_layers_of_one_input_round_it_once_and_stay_finite_in_float16(words: list[str]) -> None:
    """Also if their own steps would differ, and although a block's scale may be rounded up by a sixteenth."""
    random = np.random.default_rng(3)
    rows = random.standard_normal((64, 32)).astype(np.float32) * np.float32(64000 / 4)
    inputs = LayerInputs(0, np.full(32, 64000, np.float32), rows.clip(-64000, 64000))
    matrices = {name: random.standard_normal((32, 8)).astype(np.float32) * np.float32(size) for name, size in (("a", 1), ("b", 9))}
    matrices["b"][:16] = 0  # so the importance of its inputs is another one
    weights = {name: QuantizedWeight(name, "fp4", (32, 8), 0, 16, transposed=True, inputs="fp4") for name in matrices}
    method = parse_method(words)
    assert method is not None
    layers = quantize_layers(matrices, weights, method, inputs, WEIGHT_DTYPES["float16"])
    step = layers["a"].input_scale
    assert step is not None
    assert layers["b"].input_scale == step
    assert rounded(torch.full((1, 32), 64000.0).half(), "fp4", step).isfinite().all()


def test_a_search_also_tries_to_make_the_largest_weight_4() -> None:
    """A block of 4 and 5: with 6 as the largest number 4.8 becomes 4 or 6. With 4 for the 5 it is 3 or 4, and nearer."""
    weight = np.repeat(np.float32([5.0, 3.75, 2.5, 1.25]), 4)[:, None]
    scales = BlockScales.of(weight, WEIGHT_DTYPES["float32"])
    nearest = round_to_nearest(weight, "fp4", 0, 16, scales)
    found = round_with_search(weight, "fp4", 0, 16, scales)
    errors = [np.square(one.numbers - weight).sum() for one in (found, nearest)]
    assert errors[0] < 0.2 * errors[1]
    assert np.abs(unpack(pack(found.values, "fp4"), "fp4", (16, 1))).max() == 4
    assert GRIDS["fp4"].shares[0] == 1


def test_compensated_weights_are_fp4_and_have_less_error() -> None:
    random = np.random.default_rng(4)
    weight = random.standard_t(5, (64, 24)).astype(np.float32)
    rows = (random.standard_normal((256, 32)) @ random.standard_normal((32, 64))).astype(np.float32)
    scales = BlockScales.of(weight, WEIGHT_DTYPES["float16"])
    found = round_with_compensation(weight, rows, "fp4", 16, scales)
    nearest = round_to_nearest(weight, "fp4", 0, 16, scales)
    errors = [np.square(rows @ (one.numbers - weight)).sum() for one in (found, nearest)]
    assert errors[0] < 0.6 * errors[1]
    wide = np.repeat(scales.widen(found.scales), 16, axis=0)
    assert (found.numbers == decode_fp4(found.values) * wide).all()


@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_inputs_are_rounded_as_tensorrt_documents_it(axis: int) -> None:
    """By blocks along the channels, wherever these are, in torch and in the choice of factors."""
    x = torch.randn(3, 32, 32, 32, generator=torch.Generator().manual_seed(0)) * 3
    x.movedim(axis, -1)[0, 0, 0, :16] = 1e-7
    last = x.movedim(axis, -1).contiguous().numpy()
    numbers, scales = DynamicQuantize._run(None, last, np.float32(0.01), -1, 16, onnx.TensorProto.FLOAT8E4M3FN)  # type: ignore[arg-type]
    wide = np.repeat(scales.astype(np.float32) * np.float32(0.01), 16, axis=-1)
    wanted = numbers.astype(np.float32) * wide
    assert (rounded(x, "fp4", 0.01, axis).movedim(axis, -1).numpy() == wanted).all()
    rows = last.reshape(-1, 32)
    np.testing.assert_allclose(quantized(rows, 0.01, "fp4"), wanted.reshape(rows.shape), rtol=1e-6)
    assert rounded(x.half(), "fp4", 0.01, axis).dtype == torch.float16


@pytest.fixture(scope="module")
def calibration(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> CalibrationFile:
    drawn = Calibration(prompts=["a red apple"], steps=2, rows=64)
    path = tmp_path_factory.mktemp("calibration") / "measured.safetensors"
    return calibrate(tiny_checkpoint, path, drawn, parts=("text_encoder", "denoiser"), precision="fp32")


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tiny_checkpoint: Any, calibration: CalibrationFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 bundle of `tiny-random` with its denoiser in NVFP4, with factors and a branch."""
    own = tmp_path_factory.mktemp("nvfp4") / "bundle"
    shutil.copytree(tiny_bundle, own)
    manifest = Manifest.load(own)
    options = replace(manifest.options, quantize={"denoiser": "nvfp4"}, quantize_method=("rescale", "search", "low-rank=4"))
    graphs = {**manifest.graphs, **export_graphs("denoiser", ["denoiser"], tiny_checkpoint, options, own, calibration)}
    replace(manifest, options=options, graphs=graphs).save(own)
    return own


def denoiser(bundle: Path) -> Path:
    return bundle / Manifest.load(bundle).graphs["denoiser"].onnx.path


def test_the_file_computes_what_onnx_defines(bundle: Path) -> None:
    """The onnx package's reference, with TensorRT's operator as above, against the checks' own evaluator of the same file."""
    path, spec = denoiser(bundle), Manifest.load(bundle).graphs["denoiser"].spec
    feeds = {name: value.numpy() for name, value in random_inputs(spec, CHECK_SIZES, seed=7).items()}
    (wanted,) = ReferenceEvaluator(onnx.load(path), new_ops=[DynamicQuantize]).run(None, feeds)
    (found,) = StorageEvaluator(path).run(feeds).values()
    (whole,) = StorageEvaluator(path, round_inputs=False).run(feeds).values()
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() < 1e-4 * scale
    assert np.abs(whole - wanted).max() > 1e-2 * scale


def _kind(event: dict[str, Any]) -> str:
    """D for a node that decodes a weight, P for a product."""
    return "D" if "//numbers_" in event["name"] else "P" if event["args"]["op_name"] in ("MatMul", "Conv") else ""


def test_one_weight_at_a_time_is_decoded_although_inputs_are_rounded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which ONNX Runtime runs the nodes. It used to decode all weights before the first product."""
    options = onnxruntime.SessionOptions

    def profiled() -> onnxruntime.SessionOptions:
        made = options()
        made.enable_profiling, made.profile_file_prefix = True, str(tmp_path / "profile")
        return made

    monkeypatch.setattr(onnxruntime, "SessionOptions", profiled)
    entry = Manifest.load(bundle).graphs["denoiser"]
    evaluator = TensorEvaluator(denoiser(bundle), [entry.spec.outputs[0].name], threads=1, arithmetic="stored")
    evaluator.run({name: value.numpy() for name, value in random_inputs(entry.spec, CHECK_SIZES, seed=8).items()})
    del evaluator  # which writes the profile
    (profile,) = tmp_path.glob("profile*.json")
    events = [event for event in json.loads(profile.read_text()) if event["name"].endswith("_kernel_time")]
    events.sort(key=lambda event: event["ts"])
    order = "".join(map(_kind, events))
    assert order.count("D") == len(entry.quantized)
    # Two layers can read one tensor.
    assert max(run.count("D") for run in order.split("P")) <= 2


def test_the_file_has_the_form_that_tensorrt_compiles(bundle: Path) -> None:
    model, entry = onnx.load(denoiser(bundle), load_external_data=False), Manifest.load(bundle).graphs["denoiser"]
    assert entry.opset == 23
    assert {(item.domain, item.version) for item in model.opset_import} == {("", 23), ("trt", 1)}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for weight in entry.quantized:
        assert (weight.dtype, weight.block, weight.axis, weight.rank) == ("fp4", 16, 0, 4)
        assert weight.inputs == ("" if weight.name.endswith("point.weight") else "fp4")
        ends = ("quantized", "scale", "tensor_scale")
        wanted = [onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT]
        assert [kinds[f"{weight.name}.{end}"] for end in ends] == wanted
    operators = [node.op_type for node in model.graph.node]
    rounding = sum(bool(weight.inputs) for weight in entry.quantized)
    quantizers = [node for node in model.graph.node if node.op_type == "TRT_FP4DynamicQuantize"]
    # The two halves of a feed-forward block share an input, and the compiler crashes if a tensor is rounded twice.
    blocks = sum(weight.name.endswith("point.weight") for weight in entry.quantized)
    assert len({node.input[0] for node in quantizers}) == len(quantizers) == rounding - blocks > 0
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    assert all(ranks[node.output[0]] in (2, 3) for node in quantizers)
    products = [node.input for node in model.graph.node if node.op_type == "Mul"]
    folded = [first for first, second in products if "point.weight.input.factor" in second]
    assert len([name for name in folded if "depthwise.bias" in name]) == blocks
    assert all("depthwise" in name for name in folded), "the factors of `point` multiply the convolution before it alone"
    # A weight has two, a rounded input too.
    assert operators.count("DequantizeLinear") == 2 * len(entry.quantized) + 2 * len(quantizers)


def test_its_work_is_that_of_the_file_without_quantization(bundle: Path, tiny_bundle: Path) -> None:
    sizes = dict.fromkeys(DYNAMIC_AXES, 8)
    products = onnx_products(denoiser(bundle), sizes)
    branches = [product.flop for product in products if product.name.endswith((".low", ".branch"))]
    plain = onnx_products(denoiser(tiny_bundle), sizes)
    assert sum(product.flop for product in products) - sum(branches) == sum(product.flop for product in plain)
    assert len(branches) == 2 * len(Manifest.load(bundle).graphs["denoiser"].quantized)


def test_every_tensor_of_the_file_is_compared_and_no_other(bundle: Path, tmp_path: Path) -> None:
    check = LayerCheck("denoiser", random_inputs=True, limit_db=0.0, reproducer=tmp_path / "drift")
    report = compare_layers(bundle, check, Sampling(("a red apple",), 64, 64, 1), threads=1)
    model = onnx.load(denoiser(bundle), load_external_data=False)
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    floats = [name for node in model.graph.node for name in node.output if kinds.get(name) == onnx.TensorProto.FLOAT]
    assert {row.origin.tensor for row in report.rows} == set(floats)
    assert min(row.snr_db for row in report.rows) > 20


def test_onnx_runtime_refuses_it_by_name(bundle: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot run on onnxruntime, which has no kernels for fp4") as error:
        SanaRuntime.from_pretrained(bundle, backend="onnxruntime")
    assert error.value.found == "denoiser=nvfp4"
    draw, _, export = str(error.value.fix).partition(", or ")
    assert draw == f"sana-export generate {bundle} 'a red apple' -o apple.png --backend torch"
    assert export.startswith(f"sana-export export tiny-random -o {bundle}")
    assert "--quantize denoiser=int4-weight" in str(error.value.fix)


def test_auto_takes_a_backend_that_has_the_scheme(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", {name: lambda *_, name=name: name for name in backends.BACKENDS})
    manifest = Manifest.load(bundle)
    plain = replace(manifest, options=replace(manifest.options, quantize={"denoiser": "int4-weight"}))
    assert [backends.open_backend("auto", bundle, one) for one in (manifest, plain)] == ["torch", "onnxruntime"]


def test_the_torch_backend_computes_what_the_file_does(bundle: Path, tiny_checkpoint: Any) -> None:
    with open_runtime(bundle) as runtime:
        assert runtime.backend.name == "cpu, float32 intermediates"
        (row,) = check_stored(runtime, tiny_checkpoint, "denoiser", seed=5)
    assert row.passed
    assert row.cosine > 0.99999


def test_the_export_checks_the_rounding(
    tiny_checkpoint: Any, calibration: CalibrationFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that rounds the layers' inputs to FP8."""
    form = weights_module.product_form

    def wrong(weight: QuantizedWeight, *arguments: Any) -> ProductForm | None:
        return form(replace(weight, inputs="fp8" if weight.inputs else ""), *arguments)

    monkeypatch.setattr(weights_module, "product_form", wrong)
    options = Options("fp32", False, (), quantize={"denoiser": "nvfp4"}, quantize_method=("nearest",))
    with pytest.raises(ParityError, match=r"(?s)differs on random inputs.*--dtype fp16"):
        export_graphs("denoiser", ["denoiser"], tiny_checkpoint, options, tmp_path, calibration)
