"""The profile of an engine: which engine it takes, and that it believes no call. The module and CUDA are stand-ins."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sana_export.bench.profile import tensorrt as profile
from sana_export.bench.profile.profile import GraphRun, LayerTime
from sana_export.errors import ArtifactError, DependencyError
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.trt.compatibility import Host
from tests.support.host_tensorrt import VERSION, ILogger, with_engines

HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": VERSION}, "linux-x86_64")
NARROW = Profile("narrow", (1, 1, 1), (1, 2, 2), ((64, 64), (64, 64)))
WIDE = Profile("wide", (1, 1, 4), (1, 2, 3), ((32, 32), (512, 512)))


class Context:
    """Calls the profiler with a time that grows from run to run. `refuses` is the call that answers False."""

    profiler: Any = None

    def __init__(self, module: Any) -> None:
        self.module = module

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.module.did.append(f"shape {name}")
        return self.module.refuses != "set_input_shape"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (2, 2)

    def update_device_memory_size_for_shapes(self) -> int:
        return 512

    def set_device_memory(self, address: int, size: int) -> None:
        assert address > 0
        assert size == 512
        self.module.did.append("memory")

    def set_tensor_address(self, name: str, address: int) -> bool:
        return self.module.refuses != "set_tensor_address"

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.module.stream.cuda_stream
        if self.module.refuses == "execute_async_v3":
            return False
        self.module.did.append("run")
        runs = self.module.did.count("run")
        self.profiler.report_layer_time("product", 100.0 if runs == 1 else float(runs))
        return True


class Engine:
    def __init__(self, module: Any) -> None:
        self.module = module

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        self.module.did.append("context")
        return Context(self.module)

    def create_engine_inspector(self) -> Any:
        layers = {"Layers": [{"Name": "product", "LayerType": "gemm"}]}
        return SimpleNamespace(get_engine_information=lambda _format: json.dumps(layers))


class Stream:
    """On the CPU there is one order for all work."""

    device, cuda_stream = torch.device("cpu"), 78

    def wait_stream(self, other: Any) -> None:
        assert other == "current"

    def synchronize(self) -> None: ...


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with what was done (`did`), the engine files that were loaded (`loaded`) and the call that fails (`refuses`)."""
    did: list[str] = []
    loaded: list[bytes] = []
    found = SimpleNamespace(did=did, loaded=loaded, refuses="", stream=Stream(), __name__="host_tensorrt", __version__=VERSION)
    found.ILogger = type("Logger", (ILogger,), {})
    found.IProfiler = type("IProfiler", (), {})
    found.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    found.LayerInformationFormat = SimpleNamespace(JSON="json")

    class Module(SimpleNamespace):
        __hash__ = object.__hash__

    made = Module(**vars(found))

    class Runtime:
        def __init__(self, logger: Any) -> None: ...

        def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
            loaded.append(content)
            return None if made.refuses == "deserialize_cuda_engine" else Engine(made)

    made.Runtime = Runtime
    monkeypatch.setattr(profile, "load", lambda backend: made)
    monkeypatch.setattr(profile, "detect_host", lambda device: HERE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.stream)
    return made


def graph_run(bundle: Path, graph: str = "sampler", side: int = 2) -> GraphRun:
    """One run of `graph` with latents of `side` x `side`."""
    manifest = Manifest.load(bundle)
    spec = manifest.graphs[graph].spec
    lengths = {"latent_height": side, "latent_width": side}
    inputs = {
        tensor.name: torch.zeros([lengths.get(axis, 1) if isinstance(axis, str) else axis for axis in tensor.shape])
        for tensor in spec.inputs
    }
    return GraphRun("tensorrt-rtx", bundle, manifest, None, graph, spec, inputs, 1, 3)  # type: ignore[arg-type]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE)
    with_engines(copy, NARROW)
    return copy


@pytest.mark.parametrize(("side", "name"), [(2, "narrow"), (3, "wide")])
def test_it_takes_the_engine_that_serves_the_request(bundle: Path, module: Any, side: int, name: str) -> None:
    assert profile.layers(graph_run(bundle, side=side)) == [LayerTime("product", "gemm", 3.0)]
    (entry,) = [entry for entry in Manifest.load(bundle).engines if (entry.graph, entry.profile) == ("sampler", name)]
    assert module.loaded == [(bundle / entry.file.path).read_bytes()]
    assert module.did.count("run") == 4


def test_sizes_that_no_engine_covers(bundle: Path, module: Any) -> None:
    with pytest.raises(ArtifactError, match="no engine of sampler serves this workload here") as caught:
        profile.layers(graph_run(bundle, side=999))
    assert "narrow: " in str(caught.value.found)
    assert "latent_height" in str(caught.value.found)
    assert module.loaded == []


def test_engines_for_another_gpu(bundle: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "detect_host", lambda device: dataclasses.replace(HERE, gpus=(Gpu("H100", "9.0"),)))
    with pytest.raises(ArtifactError, match="TensorRT-RTX does not support compute capability"):
        profile.layers(graph_run(bundle))


@pytest.mark.parametrize(
    ("call", "doing"),
    [
        ("deserialize_cuda_engine", "loading"),
        ("set_input_shape", "shaping noise_pred"),
        ("set_tensor_address", "binding noise_pred"),
        ("execute_async_v3", "running"),
    ],
)
def test_a_call_that_fails_is_an_error(bundle: Path, module: Any, call: str, doing: str) -> None:
    module.refuses = call
    with pytest.raises(ArtifactError, match=doing):
        profile.layers(graph_run(bundle))


def test_a_refittable_engine_gets_its_weights_before_its_context(
    tiny_bundle: Path, tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE, options={"tf32": False, "refittable": True})

    class Weights:
        def __init__(self, trt: Any, engine: Engine, graph: Any, *_: Any, **__: Any) -> None:
            assert (trt, graph.spec.name) == (module, "context")

        def fill(self) -> None:
            module.did.append("weights")

    monkeypatch.setattr(profile, "EngineWeights", Weights)
    profile.layers(graph_run(copy, "context"))
    assert module.did[:2] == ["weights", "context"]


def test_without_a_gpu(bundle: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match="PyTorch finds no GPU"):
        profile.layers(graph_run(bundle))
