"""Engines without weights: how the real compiler builds them, and how a stand-in for the module's Refitter refits them."""

import ctypes
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import helper

from sana_export.contract import GraphSpec, TensorSpec
from sana_export.errors import ArtifactError, DependencyError
from sana_export.machine import gpu_compute_capability
from sana_export.manifest import Manifest
from sana_export.profiles import PROFILES
from sana_export.runtime.backends.tensorrt_refit import EngineWeights
from sana_export.trt.build import build_engine, configure
from sana_export.trt.bundle import build_bundle, read_instruction_tokens
from sana_export.trt.logger import logger_for
from sana_export.trt.options import BuildOptions
from tests.support.engine_builds import build, tree
from tests.support.refit_stand_in import COMMANDS, Engine, arrays, module
from tests.support.small_bundles import write_bundle

REFITTABLE = BuildOptions(refittable=True)


class Stop(Exception):
    """Ends a build when a test has seen enough."""


def test_every_weight_reaches_the_engine(tiny_bundle: Path) -> None:
    given = 0
    for graph in Manifest.load(tiny_bundle).graphs.values():
        wanted = arrays(tiny_bundle, graph)
        engine = Engine(wanted)
        EngineWeights(module(), engine, graph, tiny_bundle, **COMMANDS).fill()
        assert set(engine.weights) == set(wanted)
        for name, value in wanted.items():
            np.testing.assert_array_equal(engine.weights[name], value)
        given += len(wanted)
    assert given > 50


def test_the_weights_are_read_from_the_file_and_not_copied(bundle: Path) -> None:
    graph = Manifest.load(bundle).graphs["vae_decoder"]
    mapped: list[str] = []

    def weights(dtype: Any, pointer: int, count: int) -> Any:
        for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
            begin, end = (int(side, 16) for side in line.split()[0].split("-"))
            if begin <= pointer < end:
                mapped.append(line.split()[-1])
        return tensorrt_rtx.Weights(dtype, pointer, count)

    stub = module()
    stub.Weights = staticmethod(weights)
    EngineWeights(stub, Engine(arrays(bundle, graph)), graph, bundle, **COMMANDS).fill()
    assert mapped == [str(bundle / graph.data[0].path)]


@pytest.mark.parametrize(
    ("changes", "engine_change", "words"),
    [
        ({}, {"another": np.zeros(3, np.float16)}, "asks for weights that the bundle does not have(.|\n)*another"),
        ({}, {"weight": None}, "the bundle has weights that it does not know(.|\n)*weight"),
        ({}, {"weight": np.zeros(5, np.float16)}, r"another size(.|\n)*weight \(10 bytes, the bundle's has 221184\)"),
        ({"refuses": ("weight",)}, {}, "refuses weights(.|\n)*weight; these weights are refused"),
        ({"forgets": ("weight",)}, {}, "weights are missing(.|\n)*weight"),
        ({"works": False}, {}, "the refit failed(.|\n)*out of device memory"),
    ],
)
def test_a_partial_refit_is_an_error(changes: dict[str, Any], engine_change: dict[str, Any], words: str, bundle: Path) -> None:
    graph = Manifest.load(bundle).graphs["vae_decoder"]
    prototypes = {name: value for name, value in {**arrays(bundle, graph), **engine_change}.items() if value is not None}
    engine = Engine(prototypes)

    with pytest.raises(ArtifactError, match=words) as caught:
        EngineWeights(module(**changes), engine, graph, bundle, **COMMANDS).fill()

    assert "engine of vae_decoder" in caught.value.message
    assert caught.value.fix == COMMANDS["build"]
    assert not any(values.any() for values in engine.weights.values())


def test_damaged_weights_do_not_reach_the_engine(bundle: Path) -> None:
    graph = Manifest.load(bundle).graphs["vae_decoder"]
    engine = Engine(arrays(bundle, graph))
    path = bundle / graph.data[0].path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)

    with pytest.raises(ArtifactError, match="damaged") as caught:
        EngineWeights(module(), engine, graph, bundle, **COMMANDS).fill()
    assert caught.value.fix == COMMANDS["export"]
    assert not engine.weights["weight"].any()


@pytest.mark.parametrize("refittable", [False, True])
def test_only_a_refittable_build_strips(refittable: bool, bundle: Path) -> None:
    builder = tensorrt_rtx.Builder(logger_for(tensorrt_rtx))
    spec = Manifest.load(bundle).graphs["vae_decoder"].spec
    ranges = {"batch": (1, 1, 1), "latent_height": (4, 4, 4), "latent_width": (4, 4, 4)}
    config = configure(tensorrt_rtx, builder, spec, ranges, BuildOptions(refittable=refittable), ())

    assert config.get_flag(tensorrt_rtx.BuilderFlag.STRIP_PLAN) is refittable
    assert config.get_flag(tensorrt_rtx.BuilderFlag.REFIT_INDIVIDUAL) is refittable
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.REFIT)


def test_exactly_the_external_weights_are_marked(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real parser and network: every external weight is known by name, so the compiler leaves out exactly those."""

    marked: dict[str, bool] = {}

    def stop(module: Any, builder: Any, network: Any, config: Any, file: Any) -> bool:
        initializers = onnx.load(path, load_external_data=False).graph.initializer
        marked.update({t.name: network.are_weights_marked_refittable(t.name) for t in initializers})
        raise Stop

    monkeypatch.setattr("sana_export.trt.build._serialize", stop)
    manifest = Manifest.load(tiny_bundle)
    ranges = PROFILES["default"].ranges(manifest.model, instruction_tokens=read_instruction_tokens(tiny_bundle))
    for graph in manifest.graphs.values():
        path = tiny_bundle / graph.onnx.path
        marked.clear()
        with pytest.raises(Stop):
            build_engine(tensorrt_rtx, path, tmp_path / "x.engine", graph.spec, ranges, options=REFITTABLE)
        assert {name for name, yes in marked.items() if yes} == set(arrays(tiny_bundle, graph))


def test_a_shared_weight_keeps_both_of_its_names(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two initializers at one offset: the compiler would know only the last name."""
    path = tmp_path / "model.onnx"
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float16)
    path.with_name("w.data").write_bytes(weight.tobytes())
    names = ("first", "second")
    tensors = []
    for name in names:
        tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT16, dims=[8, 8], data_location=1)
        for key, value in (("location", "w.data"), ("offset", "0"), ("length", "128")):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, ["batch", 8]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "first"], ["h"]), helper.make_node("MatMul", ["h", "second"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString())
    spec = GraphSpec("g", (TensorSpec("x", "float16", ("batch", 8)),), (TensorSpec("y", "float16", ("batch", 8)),))
    values: dict[str, np.ndarray] = {}

    def stop(module: Any, builder: Any, network: Any, config: Any, file: Any) -> bool:
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == tensorrt_rtx.LayerType.CONSTANT and layer.name in names:
                layer.__class__ = tensorrt_rtx.IConstantLayer
                values[layer.name] = np.array(layer.weights)
        assert all(network.are_weights_marked_refittable(name) for name in names)
        raise Stop

    monkeypatch.setattr("sana_export.trt.build._serialize", stop)
    with pytest.raises(Stop):
        build_engine(tensorrt_rtx, path, tmp_path / "x.engine", spec, {"batch": (1, 1, 2)}, options=REFITTABLE)
    for name in names:
        np.testing.assert_array_equal(values[name].reshape(8, 8), weight)


def test_refittable_engines_of_every_graph(tiny_bundle: Path, tmp_path: Path) -> None:
    """With a GPU: engines without weights. Without one, the compiler refuses graphs with weights, and the error says why."""
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    graphs = Manifest.load(bundle).graphs
    with_weights = [name for name, graph in graphs.items() if graph.data]
    without = [name for name in graphs if name not in with_weights]
    assert {"sampler", "postprocess"} <= set(without)
    assert {"text_encoder", "context", "denoiser", "vae_decoder"} <= set(with_weights)
    settings: dict[str, Any] = {"backend": "tensorrt-rtx", "profile": PROFILES["static"], "options": REFITTABLE}

    build_bundle(bundle, graphs=without, **settings)
    assert all(entry.options == {"tf32": False} for entry in Manifest.load(bundle).engines)
    for name in with_weights:
        before = tree(bundle)
        if gpu_compute_capability() is None:
            with pytest.raises(DependencyError, match=f"cannot compile {name}") as caught:
                build_bundle(bundle, graphs=[name], **settings)
            assert "a machine with an NVIDIA GPU" in str(caught.value.fix)
            assert tree(bundle) == before
            continue
        manifest = build_bundle(bundle, graphs=[name], **settings)
        (entry,) = (entry for entry in manifest.engines if entry.graph == name and entry.refittable)
        engine = (bundle / entry.file.path).read_bytes()
        for weight, values in arrays(bundle, graphs[name]).items():
            assert values.tobytes()[:64] not in engine, weight


def test_a_refittable_build_needs_no_room_for_weights(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def stop(*arguments: Any, **options: Any) -> None:
        raise Stop

    monkeypatch.setattr("sana_export.trt.bundle.require_free", lambda folder, wanted, what: asked.append(wanted))
    monkeypatch.setattr("sana_export.trt.bundle.build_in_child", stop)
    graph = Manifest.load(bundle).graphs["vae_decoder"]
    for options in (BuildOptions(), REFITTABLE):
        with pytest.raises(Stop):
            build(bundle, graphs=["vae_decoder"], options=options)
    assert asked[0] - asked[1] == sum(file.bytes for file in graph.data)


def test_the_real_weights_type_reads_from_a_pointer() -> None:
    """The assumption of a refit: Weights(type, address, count) reads the memory at that address."""
    values = np.random.default_rng(1).standard_normal(7).astype(np.float16)
    weights = tensorrt_rtx.Weights(tensorrt_rtx.DataType.HALF, values.ctypes.data, values.size)
    assert (weights.size, weights.nbytes) == (7, 14)
    assert ctypes.string_at(values.ctypes.data, 14) == weights.numpy().tobytes() == values.tobytes()


def test_another_export_of_the_same_structure_refits_the_same_engine(bundle: Path) -> None:
    engine = Engine(arrays(bundle, Manifest.load(bundle).graphs["vae_decoder"]))
    held = []
    for seed in range(2):
        graph = write_bundle(bundle, seed=seed).graphs["vae_decoder"]
        EngineWeights(module(), engine, graph, bundle, **COMMANDS).fill()
        np.testing.assert_array_equal(engine.weights["weight"], arrays(bundle, graph)["weight"])
        held.append(engine.weights["weight"].copy())
    assert not np.array_equal(*held)
