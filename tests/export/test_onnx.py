"""The checks of exported files: tensors against the contract, and values against the module for random and zero inputs."""

from __future__ import annotations

import onnx
import pytest
import torch

from sana_export.contract import DYNAMIC_AXES, GraphSpec, TensorSpec
from sana_export.errors import ParityError
from sana_export.export.example_inputs import CHECK_SIZES, TRACE_SIZES, graph_spec
from sana_export.export.onnx import check_onnx, check_values, export_onnx, run_module
from sana_export.graphs.builders import build_graph
from sana_export.graphs.storage import WeightFile
from sana_export.manifest import Options

SPEC = GraphSpec(
    "small",
    (TensorSpec("image", "float32", ("batch", 3, "image_height", "image_width")),),
    (TensorSpec("pixels", "float32", ("batch", 3, "image_height", "image_width")),),
)


class Scale(torch.nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.full((3, 1, 1), factor))

    def forward(self, image):
        return image * self.factor


class Normalize(torch.nn.Module):
    """Has an epsilon that the ONNX optimizer takes for zero."""

    def forward(self, image):
        return image / (image.abs().sum(1, keepdim=True) + 1e-12)


def export(module, spec, path):
    with WeightFile(path.with_name("model.onnx.data")) as weights:
        export_onnx(module, spec, path, weights)


def check(path, module, spec, precision):
    check_values(path, spec, run_module(module, spec), precision)


def test_a_good_export_passes(tmp_path):
    path = tmp_path / "model.onnx"
    export(Scale(0.5), SPEC, path)
    model = check_onnx(path, SPEC)
    check(path, Scale(0.5), SPEC, "fp32")
    assert [axis.dim_param for axis in model.graph.output[0].type.tensor_type.shape.dim][2:] == ["image_height", "image_width"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_a_changed_weight_is_detected(tmp_path):
    path = tmp_path / "model.onnx"
    module = Scale(0.5)
    export(module, SPEC, path)
    module.factor.data[1] = 0.52
    with pytest.raises(ParityError, match="random inputs"):
        check(path, module, SPEC, "fp32")


def test_a_lost_epsilon_is_detected(tmp_path):
    path = tmp_path / "model.onnx"
    export(Normalize(), SPEC, path)
    with pytest.raises(ParityError, match="zero inputs"):
        check(path, Normalize(), SPEC, "fp32")


@pytest.mark.parametrize("change", ["name", "dtype", "axis"])
def test_tensors_that_differ_from_the_contract_are_detected(tmp_path, change):
    path = tmp_path / "model.onnx"
    export(Scale(0.5), SPEC, path)
    model = onnx.load(path)
    value = model.graph.output[0]
    if change == "name":
        value.name = "other"
        model.graph.node[-1].output[0] = "other"
    elif change == "dtype":
        model.graph.node.append(onnx.helper.make_node("Cast", [value.name], ["half"], to=onnx.TensorProto.FLOAT16))
        value.name = "half"
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    else:
        value.type.tensor_type.shape.dim[2].dim_param = "batch"
    onnx.save(model, path)
    with pytest.raises(ParityError, match="contract"):
        check_onnx(path, SPEC)


def test_the_sizes_for_tracing_and_checking_distinguish_all_axes():
    own = [axis for axis in DYNAMIC_AXES if "image_" not in axis]
    traced = [TRACE_SIZES.of(axis) for axis in own]
    assert len(set(traced)) == len(traced)
    assert min(traced) >= 2
    assert all(TRACE_SIZES.of(axis) != CHECK_SIZES.of(axis) for axis in own)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["context", "vae_decoder"])
def test_half_precision_exports_equal_their_modules(tiny_checkpoint, tmp_path, name, precision):
    options = Options(precision, clamp=True, pag_layers=(1,))
    module, spec = build_graph(name, tiny_checkpoint, options), graph_spec(name, tiny_checkpoint, options)
    path = tmp_path / "model.onnx"
    export(module, spec, path)
    check_onnx(path, spec)
    check(path, module, spec, precision)
