"""The stand-ins of the tests have the interface of the real module. What the real TensorRT-RTX says without a GPU."""

from __future__ import annotations

import inspect
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from sana_export.errors import ArtifactError, DependencyError
from sana_export.machine import gpu_compute_capability
from sana_export.manifest import Manifest
from sana_export.profiles import static_profile
from sana_export.runtime.backends.cuda import CudaDevice, Device
from sana_export.runtime.backends.tensorrt_context import EngineContext, SharedMemory
from sana_export.runtime.backends.tensorrt_engine import LoadedEngine
from sana_export.runtime.backends.tensorrt_options import EngineOptions
from sana_export.trt.bundle import build_bundle
from tests.support import cuda_driver, host_tensorrt
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

real = pytest.importorskip("tensorrt_rtx")

PAIRS = {
    "Runtime": host_tensorrt.Runtime,
    "ICudaEngine": host_tensorrt.Engine,
    "IExecutionContext": host_tensorrt.Context,
    "IRuntimeConfig": host_tensorrt.RuntimeConfig,
    "IRuntimeCache": host_tensorrt.RuntimeCache,
}
#: What only the stand-ins have.
OWN = {
    *("module", "shapes", "addresses", "engine", "config", "spec", "ranges", "scales", "session", "weights", "cache"),
    *("allocation", "open", "own_graph", "memory", "memory_size", "streams", "has_contexts"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_stand_in_has_nothing_that_the_module_lacks(name: str) -> None:
    public = {member for member in vars(PAIRS[name]) if not member.startswith("_")} - OWN
    assert public
    assert public <= set(dir(getattr(real, name))), name


@pytest.mark.parametrize(
    "name",
    ["EngineValidity", "ExecutionContextAllocationStrategy", "DynamicShapesKernelSpecializationStrategy", "CudaGraphStrategy"],
)
def test_enumerations_have_the_same_members(name: str) -> None:
    assert set(getattr(host_tensorrt, name).__members__) == set(getattr(real, name).__members__)


def test_diagnostics_have_the_same_bits() -> None:
    theirs = {name: int(member) for name, member in real.EngineInvalidityDiagnostics.__members__.items()}
    assert {name: int(member) for name, member in host_tensorrt.EngineInvalidityDiagnostics.__members__.items()} == theirs


@pytest.mark.parametrize("kind", [CudaDevice, HostDevice])
def test_devices_take_what_the_interface_says(kind: Any) -> None:
    for name, method in vars(Device).items():
        if name.startswith("_"):
            continue
        own = getattr(kind, name, None)
        if inspect.isfunction(method):
            assert list(inspect.signature(own).parameters) == list(inspect.signature(method).parameters), name


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def load(bundle: Path, module: Any, device: HostDevice | None = None) -> LoadedEngine:
    (entry,) = [engine for engine in Manifest.load(bundle).engines if engine.graph == "sampler"]
    device = device or HostDevice()
    path, settings = bundle / entry.file.path, EngineOptions().settings("sampler")
    return LoadedEngine(module, device, entry, path, settings=settings, build="sana-export build ...")


def test_the_real_module_refuses_a_file_that_is_not_an_engine(bundle: Path) -> None:
    with_engines(bundle, static_profile(96, 160))
    with pytest.raises(ArtifactError, match="it is damaged") as caught:
        load(bundle, real)
    assert "MALFORMED_ENGINE" in str(caught.value)
    assert caught.value.fix == "sana-export build ..."


@pytest.mark.skipif(gpu_compute_capability() is not None, reason="there is a GPU")
def test_what_the_real_module_says_without_a_driver(bundle: Path) -> None:
    """The real compiler's engine in the real runtime, which behaves as with a driver that is too old."""
    manifest = build_bundle(bundle, backend="tensorrt-rtx", profile=static_profile(96, 160), graphs=["sampler"])
    assert manifest.engines[0].activation_bytes >= 0
    with pytest.raises(DependencyError, match="CUDA does not work here") as caught:
        load(bundle, real)
    assert real.__version__ in str(caught.value)
    assert "update NVIDIA's driver" in str(caught.value.fix)


@pytest.mark.parametrize(("code", "fix"), [(100, "CUDA_VISIBLE_DEVICES"), (802, "nvidia-fabricmanager"), (999, "nvidia-smi")])
def test_what_the_real_module_says_of_a_driver_that_does_not_start(bundle: Path, driver_library: Path, code: int, fix: str) -> None:
    build_bundle(bundle, backend="tensorrt-rtx", profile=static_profile(96, 160), graphs=["sampler"])
    run = cuda_driver.run(driver_library, ["-m", "tests.trt.test_module_interface", str(bundle)], CUDA_STAND_IN_INIT=str(code))
    assert f"cudaError {code}: " in run.stdout, run.stdout + run.stderr
    assert fix in run.stdout


def test_the_compiler_says_what_an_engine_works_in(bundle: Path) -> None:
    def work(side: int) -> int:
        manifest = build_bundle(bundle, backend="tensorrt-rtx", profile=static_profile(side, side), graphs=["vae_decoder"])
        (engine,) = [engine for engine in manifest.engines if engine.profile == f"static-{side}"]
        return engine.activation_bytes

    small, large = work(256), work(512)
    # More than the float32 image alone, and no more than four times it for four times the pixels.
    assert small > 3 * 256 * 256 * 4
    assert 2 < large / small <= 4


def test_loads_with_the_stand_in(bundle: Path) -> None:
    with_engines(bundle, static_profile(96, 160))
    device = HostDevice()
    engine = load(bundle, HostTensorRT(device), device)
    assert EngineContext(engine, device, SharedMemory(device)).capturable


if __name__ == "__main__":  # in a child process, on another driver
    try:
        load(Path(sys.argv[1]), real)
    except DependencyError as error:
        sys.stdout.write(str(error))
