"""`build_engine` with the real TensorRT-RTX compiler, in this process."""

import hashlib
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

from sana_export.contract import GraphSpec, TensorSpec
from sana_export.errors import ArtifactError, Cancelled, DependencyError
from sana_export.files import partial_path
from sana_export.profiles import Range
from sana_export.progress import Progress
from sana_export.trt.build import Built, build_engine, configure, input_shapes
from sana_export.trt.logger import logger_for
from sana_export.trt.options import BuildOptions
from tests.support.small_bundles import sampler, vae_decoder, write_onnx

RANGES: dict[str, Range] = {
    "batch": (1, 1, 2),
    "branches": (1, 2, 3),
    "tokens": (1, 16, 64),
    "latent_height": (4, 8, 16),
    "latent_width": (4, 8, 24),
    "output_height": (32, 64, 128),
    "output_width": (32, 64, 128),
}
MAGIC = b"trt"


def build(tmp_path: Path, spec: GraphSpec, **options: Any) -> Built:
    return build_engine(tensorrt_rtx, tmp_path / "model.onnx", tmp_path / "out.engine", spec, RANGES, **options)


def linear(path: Path, *, element: str = "float32", length: int = 8, rows: int = 8, name: str = "project") -> GraphSpec:
    """A matrix product [batch, length] x [rows, 8] in `element`; the shapes do not match if rows differs from length."""
    spec = GraphSpec("linear", (TensorSpec("x", element, ("batch", length)),), (TensorSpec("y", element, ("batch", 8)),))
    weight = np.random.default_rng(0).standard_normal((rows, 8)).astype("float16" if element == "float16" else "float32")
    tensor = numpy_helper.from_array(weight, "w")
    if element == "bfloat16":
        upper_half = (weight.view(np.uint32) >> 16).astype(np.uint16)
        tensor = helper.make_tensor("w", TensorProto.BFLOAT16, weight.shape, upper_half.tobytes(), raw=True)
    write_onnx(path, spec, [helper.make_node("MatMul", ["x", "w"], ["y"], name=name)], {"w": tensor})
    return spec


def left_over(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name not in ("model.onnx", "model.onnx.data"))


@pytest.mark.parametrize("capabilities", [(), ("8.9",)], ids=["portable", "8.9"])
@pytest.mark.parametrize("make", [sampler, vae_decoder])
def test_real_engine_with_dynamic_axes(make: Any, capabilities: tuple[str, ...], tmp_path: Path) -> None:
    spec = make(tmp_path / "model.onnx", 0)

    built = build(tmp_path, spec, compute_capabilities=capabilities)

    engine = (tmp_path / "out.engine").read_bytes()
    assert MAGIC in engine[:4]
    assert built.bytes == len(engine)
    assert built.sha256 == hashlib.sha256(engine).hexdigest()
    assert 0 < built.seconds < 60
    assert left_over(tmp_path) == ["out.engine"]


def test_the_engine_holds_the_external_weights(tmp_path: Path) -> None:
    spec = vae_decoder(tmp_path / "model.onnx", 0)
    built = build(tmp_path, spec)

    weights = np.fromfile(tmp_path / "model.onnx.data", np.uint8)
    assert weights.size == 3 * 32 * 32 * 4 * 9 * 2
    assert built.bytes > weights.size
    # The compiler may reorder them, so compare what no order changes: no float16 value occurs less often than in the file.
    engine = np.frombuffer((tmp_path / "out.engine").read_bytes()[: built.bytes // 2 * 2], np.uint16)
    shifted = np.frombuffer((tmp_path / "out.engine").read_bytes()[1 : 1 + (built.bytes - 1) // 2 * 2], np.uint16)
    held = np.bincount(engine, minlength=1 << 16) + np.bincount(shifted, minlength=1 << 16)
    assert (held >= np.bincount(weights.view(np.uint16), minlength=1 << 16)).all()


class Recorder:
    """A builder and its configuration in one. It keeps what is set."""

    def __init__(self) -> None:
        self.flags: set[str] = set()
        self.features: set[str] = set()

    def create_builder_config(self) -> "Recorder":
        return self

    def clear_flag(self, flag: str) -> None:
        assert flag == "TF32"

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def set_preview_feature(self, feature: str, enable: bool) -> None:
        assert enable
        self.features.add(feature)


def enumeration(*names: str) -> Any:
    return type("Enumeration", (), {name: name for name in names})


def test_flags_and_preview_features_are_set_if_the_module_has_them() -> None:
    spec, feature = GraphSpec("g", (TensorSpec("x", "float32", (4,)),), ()), "RUNTIME_ACTIVATION_RESIZE_10_10"
    full = SimpleNamespace(BuilderFlag=enumeration("TF32"), PreviewFeature=enumeration(feature))
    other = SimpleNamespace(
        BuilderFlag=enumeration("TF32", "REQUIRE_USER_ALLOCATION", "WEIGHT_STREAMING"), PreviewFeature=enumeration()
    )
    found = [configure(module, Recorder(), spec, {}, BuildOptions(), ()) for module in (full, other)]
    streaming = configure(other, Recorder(), spec, {}, BuildOptions(weight_streaming=True), ())
    assert [(config.flags, config.features) for config in found] == [(set(), {feature}), ({"REQUIRE_USER_ALLOCATION"}, set())]
    assert streaming.flags == {"WEIGHT_STREAMING"}  # the real compiler refuses both together


@pytest.mark.parametrize("tf32", [False, True])
def test_configuration_is_what_was_asked_for(tf32: bool) -> None:
    spec = GraphSpec("g", (TensorSpec("x", "float32", ("batch", 4)),), ())
    builder = tensorrt_rtx.Builder(logger_for(tensorrt_rtx))

    config = configure(tensorrt_rtx, builder, spec, RANGES, BuildOptions(tf32), ("8.9", "12.0"))

    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32) is tf32
    assert config.get_flag(tensorrt_rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert config.get_preview_feature(tensorrt_rtx.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10)
    assert config.num_optimization_profiles == 1
    assert [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)] == [
        "SM89",
        "SM120",
    ]


def test_shapes_of_the_profile_come_from_the_contract() -> None:
    spec = GraphSpec(
        "g",
        (TensorSpec("x", "float32", ("batch", 4, "latent_width")), TensorSpec("timestep", "float32", (1,))),
        (),
    )
    assert input_shapes(spec, RANGES) == {"x": ((1, 4, 4), (1, 4, 8), (2, 4, 24))}


@pytest.mark.parametrize("element", ["float32", "float16", "bfloat16"])
def test_precision_is_the_graphs_own(element: str, tmp_path: Path) -> None:
    spec = linear(tmp_path / "model.onnx", element=element)
    assert build(tmp_path, spec).bytes > 0
    other = GraphSpec(spec.name, tuple(TensorSpec("x", "int32", tensor.shape) for tensor in spec.inputs), spec.outputs)
    with pytest.raises(ArtifactError, match=rf"inputs differ(.|\n)*x {element} (.|\n)*x int32"):
        build(tmp_path, other)


def test_mixed_precision_is_refused_rather_than_cast(tmp_path: Path) -> None:
    spec = GraphSpec(
        "mixed",
        (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("z", "float16", ("batch", 4))),
        (TensorSpec("y", "float32", ("batch", 4)),),
    )
    path = tmp_path / "model.onnx"
    nodes = [helper.make_node("Cast", ["z"], ["z32"], to=1), helper.make_node("Add", ["x", "z32"], ["y"], name="adder")]
    write_onnx(path, spec, nodes, {})
    model = onnx.load(path)
    del model.graph.node[0]
    model.graph.node[0].input[1] = "z"
    onnx.save(model, path)

    with pytest.raises(ArtifactError, match=r"'adder' \(Add\)") as caught:
        build(tmp_path, spec)
    assert "Float and Half" in str(caught.value)


def test_integer_inputs_and_uint8_outputs(tmp_path: Path) -> None:
    spec = GraphSpec(
        "postprocess",
        (
            TensorSpec("image", "float32", ("batch", 3, "output_height", "output_width")),
            TensorSpec("row_index", "int64", ("output_height",)),
        ),
        (TensorSpec("pixels", "uint8", ("batch", "output_height", "output_width", 3)),),
    )
    nodes = [
        helper.make_node("Gather", ["image", "row_index"], ["rows"], axis=2),
        helper.make_node("Transpose", ["rows"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("Cast", ["last"], ["pixels"], to=TensorProto.UINT8),
    ]
    write_onnx(tmp_path / "model.onnx", spec, nodes, {})
    assert build(tmp_path, spec).bytes > 0


def test_progress_rises_to_one_and_names_the_graph(tmp_path: Path) -> None:
    seen: list[Progress] = []
    build(tmp_path, linear(tmp_path / "model.onnx"), on_progress=seen.append)

    fractions = [progress.done for progress in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert {progress.total for progress in seen} == {1}
    names = {tuple(progress.doing.split(": ")) for progress in seen}
    assert {graph for graph, _ in names} == {"linear"}
    assert len({phase for _, phase in names}) > 3


@pytest.mark.parametrize("after", [1, 20, 60])
def test_cancelled_build_writes_nothing_and_logs_no_error(after: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[None] = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > after

    with caplog.at_level(logging.INFO), pytest.raises(Cancelled) as caught:
        build(tmp_path, linear(tmp_path / "model.onnx"), cancelled=cancelled)

    assert caught.value.exit_code == 130
    assert left_over(tmp_path) == []
    assert caplog.records == []


def test_an_exception_of_the_callback_comes_back_and_nothing_is_written(tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        if progress.done > 0.3:
            raise BrokenPipeError("nobody listens")

    with pytest.raises(BrokenPipeError, match="nobody listens"):
        build(tmp_path, linear(tmp_path / "model.onnx"), on_progress=fail)
    assert left_over(tmp_path) == []


def test_full_disk_leaves_the_old_engine_whole(tmp_path: Path) -> None:
    spec = linear(tmp_path / "model.onnx")
    (tmp_path / "out.engine").write_bytes(b"old")
    partial_path(tmp_path / "out.engine").symlink_to("/dev/full")

    with pytest.raises(DependencyError, match="disk is full") as caught:
        build(tmp_path, spec)

    assert caught.value.exit_code == 3
    assert (tmp_path / "out.engine").read_bytes() == b"old"
    assert left_over(tmp_path) == ["out.engine"]


def test_folder_that_cannot_be_made_is_a_dependency_error(tmp_path: Path) -> None:
    spec = linear(tmp_path / "model.onnx")
    (tmp_path / "engines").write_text("a file where a folder belongs")

    with pytest.raises(DependencyError, match="cannot be written"):
        build_engine(tensorrt_rtx, tmp_path / "model.onnx", tmp_path / "engines" / "x" / "y.engine", spec, RANGES)


def corrupt(path: Path, seed: int) -> GraphSpec:
    spec = linear(path)
    path.write_bytes(b"not an ONNX file" * 9)
    return spec


def truncated(path: Path, seed: int) -> GraphSpec:
    spec = vae_decoder(path, seed)
    path.write_bytes(path.read_bytes()[:-40])
    return spec


def without_data(path: Path, seed: int) -> GraphSpec:
    spec = vae_decoder(path, seed)
    path.with_name("model.onnx.data").unlink()
    return spec


def short_data(path: Path, seed: int) -> GraphSpec:
    spec = vae_decoder(path, seed)
    path.with_name("model.onnx.data").write_bytes(b"123")
    return spec


def outside_data(path: Path, seed: int) -> GraphSpec:
    spec = vae_decoder(path, seed)
    shutil.copy(path.with_name("model.onnx.data"), path.parent.parent / "stolen.data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = "../stolen.data" if entry.key == "location" else entry.value
    path.write_bytes(model.SerializeToString())
    return spec


def unknown_operator(path: Path, seed: int) -> GraphSpec:
    spec = linear(path, name="weird")
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain = "Frobnicate", "foo"
    model.opset_import.append(helper.make_opsetid("foo", 1))
    onnx.save(model, path)
    return spec


def wrong_sizes(path: Path, seed: int) -> GraphSpec:
    spec = linear(path)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(model, path)
    return spec


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (corrupt, ["Failed to parse the ONNX model"]),
        (truncated, ["Failed to parse the ONNX model"]),
        (without_data, ["model.onnx.data", "Failed to open file", "weight"]),
        (short_data, ["model.onnx.data", "out of range", "file size=3"]),
        (outside_data, ["../stolen.data", "not allowed"]),
        (unknown_operator, ["node 0 'weird' (Frobnicate)", "Plugin not found"]),
        (wrong_sizes, ["'project' (MatMul)", "input0 = 5", "input1 = 8"]),
    ],
)
def test_broken_onnx_is_named_with_its_reason(
    make: Any, words: Iterable[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    spec = make(folder / "model.onnx", 0)

    export = "sana-export export fox -o bundle"
    with caplog.at_level(logging.INFO), pytest.raises(ArtifactError) as caught:
        build_engine(tensorrt_rtx, folder / "model.onnx", folder / "out.engine", spec, RANGES, export=export)

    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert caught.value.fix == export
    for word in [str(folder / "model.onnx"), *words]:
        assert word in text
    # Without a GPU the library adds a line about the driver to each error, and source positions of its own.
    for noise in ("cudaError", "catchCudaError", ".cpp:", "/_src/"):
        assert noise not in text
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert capfd.readouterr() == ("", "")
    assert left_over(folder) == []


def test_compiler_error_names_the_layer(tmp_path: Path) -> None:
    spec = linear(tmp_path / "model.onnx", name="project")
    model = onnx.load(tmp_path / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "tokens"
    onnx.save(model, tmp_path / "model.onnx")
    loose = GraphSpec("linear", (TensorSpec("x", "float32", ("batch", "tokens")),), spec.outputs)

    with pytest.raises(ArtifactError, match=r"cannot compile linear(.|\n)*project(.|\n)*mismatching dimensions"):
        build_engine(tensorrt_rtx, tmp_path / "model.onnx", tmp_path / "e", loose, {"batch": (1, 1, 2), "tokens": (4, 4, 4)})


@pytest.mark.parametrize(
    ("element", "words"),
    [("float32", "'project' for Turing (SM75): FP32 GEMM is not supported"), ("bfloat16", "target(s) sm75")],
)
def test_precision_that_a_target_lacks_names_the_target_and_the_way_out(element: str, words: str, tmp_path: Path) -> None:
    spec = linear(tmp_path / "model.onnx", element=element, name="project")

    with pytest.raises(ArtifactError) as caught:
        build(tmp_path, spec, compute_capabilities=("7.5",))
    assert words in str(caught.value)
    assert "--compute-capability" in str(caught.value.fix)
    assert ".cpp" not in str(caught.value)


def test_another_graph_than_the_manifests_is_refused(tmp_path: Path) -> None:
    spec = sampler(tmp_path / "model.onnx", 0)
    wanted = GraphSpec(spec.name, spec.inputs[:-1], (*spec.outputs, TensorSpec("extra", "uint8", ("batch",))))

    with pytest.raises(ArtifactError, match=r"its inputs differ(.|\n)*found:  weights float32 \[\?\]"):
        build(tmp_path, wanted)
    with pytest.raises(ArtifactError, match=r"its outputs differ(.|\n)*wanted: extra uint8 \[\?\]"):
        build(tmp_path, GraphSpec(spec.name, spec.inputs, wanted.outputs))


def test_ranges_out_of_order_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    spec = linear(tmp_path / "model.onnx")

    with pytest.raises(ValueError, match="min <= opt <= max"):
        build_engine(tensorrt_rtx, tmp_path / "model.onnx", tmp_path / "e", spec, {"batch": (3, 2, 4)})


def test_module_without_a_gpu_that_it_needs(tmp_path: Path) -> None:
    class NeedsGpu:
        """Like `tensorrt` without a driver: the library returns no builder."""

        __name__ = "tensorrt"
        __version__ = "11.0"
        ILogger = tensorrt_rtx.ILogger

        @staticmethod
        def Builder(logger: Any) -> None:
            logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    with pytest.raises(DependencyError, match="CUDA initialization failure with error: 35"):
        build_engine(NeedsGpu(), tmp_path / "m.onnx", tmp_path / "e", GraphSpec("g", (), ()), RANGES)
