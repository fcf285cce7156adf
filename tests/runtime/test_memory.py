"""The GPU memory that engines need, computed before they are loaded, and the memory mode that follows from it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.errors import ArtifactError, DependencyError, UsageError
from sana_export.files import FileEntry
from sana_export.machine import Gpu
from sana_export.manifest import EngineEntry, Manifest
from sana_export.profiles import Profile
from sana_export.runtime import Request, SanaRuntime
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.runtime.backends.weight_streaming import weight_budget
from sana_export.runtime.memory import MemoryRequirement, choose_memory_mode, memory_requirements
from sana_export.trt.compatibility import Host
from sana_export.trt.selection import engine_set
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import HostTensorRT, with_engines

WIDE = Profile("wide", (1, 1, 2), (1, 2, 3), ((32, 32), (512, 512)))
HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 2, "seed": 1}

#: Engine and activation bytes a graph.
SIZES = {
    "text_encoder": (5000, 100),
    "context": (400, 10),
    "denoiser": (3000, 900),
    "sampler": (1, 1),
    "vae_decoder": (700, 4000),
    "postprocess": (2, 5),
}


def entries(manifest: Manifest, **options: Any) -> dict[str, EngineEntry]:
    ranges = WIDE.ranges(manifest.model, instruction_tokens=10)
    found = {}
    for name, (size, work) in SIZES.items():
        own = {axis: ranges[axis] for tensor in manifest.graphs[name].spec.inputs for axis in tensor.shape if isinstance(axis, str)}
        file = FileEntry(f"{name}.engine", "0" * 64, size)
        found[name] = EngineEntry(
            name, "tensorrt-rtx", name, file, "", "1", (), "any", "wide", own, options=options, activation_bytes=work
        )
    return found


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    return Manifest.load(tiny_bundle)


def test_requirements_of_the_modes(manifest: Manifest) -> None:
    found = memory_requirements(manifest, entries(manifest))
    assert set(found) == {"resident", "staged"}
    assert (found["resident"].weights, found["resident"].work) == (9103, 4000)
    # The largest stage is the one that weights, work and tensors together make the largest: its images are.
    image = 2 * 3 * 512 * 512 * 4
    assert found["staged"].weights == 702
    assert found["staged"].work == 4000
    # postprocess: the image, tables of a delivered size of up to twice it, and its bytes.
    assert found["staged"].tensors == image + 2 * (2 * 1024 * (8 + 4)) + 2 * 1024 * 1024 * 3
    assert found["resident"].tensors == found["staged"].tensors
    streaming = memory_requirements(manifest, entries(manifest, weight_streaming=True))["streaming"]
    assert (streaming.weights, streaming.work) == (0, 4000)
    given = sum(file.bytes for name in SIZES for file in manifest.graphs[name].data)
    assert memory_requirements(manifest, entries(manifest, refittable=True))["resident"].weights == 9103 + given > 10**6


GB = 10**9
NEEDS = {
    "resident": MemoryRequirement(9 * GB, 2 * GB, GB),
    "staged": MemoryRequirement(5 * GB, 2 * GB, GB),
    "streaming": MemoryRequirement(GB, 2 * GB, GB),
}


@pytest.mark.parametrize(
    ("mode", "free", "chosen", "warned"),
    [
        ("auto", 12, "resident", False),
        ("auto", 11, "staged", False),
        ("auto", 8, "staged", False),
        ("auto", 7, "streaming", False),
        ("auto", 2, "streaming", True),
        ("resident", 12, "resident", False),
        ("resident", 10, "resident", True),
        ("staged", 30, "staged", False),
        ("streaming", 30, "streaming", False),
    ],
)
def test_the_mode_that_fits(mode: str, free: int, chosen: str, warned: bool) -> None:
    found, warning = choose_memory_mode(mode, NEEDS, free * GB, Path("bundle"), "tensorrt-rtx")
    assert found == chosen
    assert (warning is not None) is warned
    if warning:
        assert f"{free}.00 GB of GPU memory are free" in warning


@pytest.mark.parametrize(
    ("mode", "free", "offered", "fix"),
    [
        ("resident", 8, NEEDS, "--memory staged"),
        ("staged", 4, NEEDS, "--memory streaming"),
        ("auto", 1, NEEDS, "sana-export build bundle --backend tensorrt-rtx --profile static --weight-streaming"),
        ("streaming", 9, {"staged": NEEDS["staged"]}, "--memory staged"),
    ],
)
def test_too_little_memory_names_the_mode_that_fits(mode: str, free: int, offered: dict[str, MemoryRequirement], fix: str) -> None:
    with pytest.raises(DependencyError) as caught:
        choose_memory_mode(mode, offered, free * GB, Path("bundle"), "tensorrt-rtx")
    assert caught.value.fix == fix
    assert f"{free}.00 GB free" in str(caught.value)
    assert "staged: 5.00 GB for weights, up to 8.00 GB in all" in str(caught.value)


def opened(bundle: Path, device: HostDevice, **options: Any) -> tuple[SanaRuntime, HostTensorRT]:
    module = HostTensorRT(device)

    def backend(bundle: Path, manifest: Any) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=module, device=device, machine=HERE)

    return SanaRuntime.from_pretrained(bundle, backend=backend, **options), module


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE)
    return copy


def test_staged_holds_one_stage_at_a_time_and_gives_the_same_images(bundle: Path) -> None:
    resident, _ = opened(bundle, HostDevice(), memory="resident")
    wanted = [resident("fox", output_type="np", **SMALL).images for _ in range(2)]
    staged, module = opened(bundle, HostDevice(), memory="staged")
    assert staged.memory == "staged"
    assert module.loads == 0, "nothing is loaded before it is needed"
    for image in wanted:
        np_image = staged("fox", output_type="np", **SMALL).images
        assert (np_image == image).all()
    assert module.loads == 6 + 5, "the second time the prompt is in the cache, so no text encoder is needed"
    weights = {name: sum(file.bytes for file in graph.files) for name, graph in staged.manifest.graphs.items()}
    saved = resident.backend.gpu.peak - staged.backend.gpu.peak
    assert saved > 0.9 * min(weights["denoiser"], weights["text_encoder"] + weights["vae_decoder"])
    assert staged.backend.gpu.captures == 0


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_nothing_of_a_closed_runtime_stays_on_the_device(bundle: Path, memory: str) -> None:
    device = HostDevice()
    with opened(bundle, device, memory=memory)[0] as runtime:
        plan = runtime.plan(Request("a red fox", **SMALL))
        for step in runtime.steps(plan, runtime.encode(plan)):
            runtime.decode(plan, step.x0)
        del step
        for options in ({}, {"pag_scale": 2.0}, {"decoder_tile": 64}):
            runtime("fox", **SMALL, **options)
        assert device.used > 0
    assert (device.used, device.kept) == (0, 0)


def test_a_stage_leaves_the_next_one_the_memory_that_it_worked_in(bundle: Path) -> None:
    """On a device that has room for each stage with its own work, the second image needs no more than the first."""

    def draw(capacity: int, work: int) -> tuple[Any, HostDevice]:
        device = HostDevice(capacity)
        runtime, module = opened(bundle, device, memory="staged")
        module.work_factors = {"vae_decoder": work // (32 * 3 * 5)}
        images = [runtime("fox", output_type="np", **SMALL).images for _ in range(2)]
        np.testing.assert_array_equal(*images)
        return images[0], device

    work = 1_000_000
    wanted, device = draw(1 << 40, 0)
    found, small = draw(device.peak + work // 2, work)
    np.testing.assert_array_equal(found, wanted)
    assert small.kept < small.peak, "memory goes back to the driver at a change of stage"


def test_a_gpu_that_is_too_small_is_reported_before_anything_is_loaded(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    big = tuple(dataclasses.replace(engine, file=dataclasses.replace(engine.file, bytes=4 * GB)) for engine in manifest.engines)
    need = memory_requirements(manifest, engine_set(bundle, "tensorrt-rtx", big).typical(manifest.model))
    assert (need["resident"].weights, need["staged"].weights) == (24 * GB, 8 * GB)
    device = HostDevice(capacity=6 * GB)
    dataclasses.replace(manifest, engines=big).save(bundle)
    with pytest.raises(DependencyError, match="too little GPU memory"):
        opened(bundle, device)
    assert device.peak == 0


@pytest.mark.parametrize(
    ("weights", "work", "free", "budget"),
    [
        (10 * GB, 2 * GB, 10 * GB, 6 * GB),  # more than 32 bits
        (3 * GB, 2 * GB, 10 * GB, 3 * GB),
        (10 * GB, 2 * GB, GB, 0),
    ],
)
def test_as_many_weights_stay_on_the_device_as_fit(weights: int, work: int, free: int, budget: int) -> None:
    assert weight_budget(weights, work, free) == budget


def streaming_engine(bundle: Path, mode: str, **settings: Any) -> Any:
    """The denoiser's engine of a bundle whose engines can stream their weights, in a runtime with a module that has `settings`."""
    with_engines(bundle, WIDE, options={"tf32": False, "weight_streaming": True})
    runtime, module = opened(bundle, HostDevice(capacity=40 * GB), memory=mode)
    vars(module).update(settings)
    runtime.sessions.require(["denoiser"])
    (engine,) = runtime.sessions["denoiser"].loaded.values()
    return engine


@pytest.mark.parametrize(("mode", "streams"), [("streaming", True), ("staged", False)])
def test_weights_are_streamed_in_that_mode_alone(bundle: Path, mode: str, streams: bool) -> None:
    engine = streaming_engine(bundle, mode, streamable_bytes=100 * GB)
    assert engine.engine.weight_streaming_budget_v2 == pytest.approx(0.75 * 40 * GB if streams else 100 * GB, rel=0.001)
    assert engine.streams is streams


def test_weights_that_all_fit_are_not_streamed(bundle: Path) -> None:
    engine = streaming_engine(bundle, "streaming")
    assert engine.engine.weight_streaming_budget_v2 == engine.engine.streamable_weights_size
    assert not engine.streams


def test_a_budget_that_is_not_accepted_is_an_error(bundle: Path) -> None:
    with pytest.raises(ArtifactError, match="streaming the weights of the engine of denoiser failed"):
        streaming_engine(bundle, "streaming", streamable_bytes=100 * GB, refuses_budgets=True)


def test_images_are_the_same_if_weights_are_streamed(bundle: Path) -> None:
    wanted = opened(bundle, HostDevice())[0]("fox", output_type="np", **SMALL).images
    with_engines(bundle, WIDE, options={"tf32": False, "weight_streaming": True})
    runtime, module = opened(bundle, HostDevice(), memory="streaming")
    module.streamable_bytes = 1 << 50
    assert (runtime("fox", output_type="np", **SMALL).images == wanted).all()
    assert runtime.backend.gpu.captures == 0


def test_modes_of_a_backend_without_a_gpu(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="unknown memory mode 'small'"):
        SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", memory="small")
    with pytest.raises(UsageError, match="the backend onnxruntime cannot stream weights"):
        SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", memory="streaming")
    staged = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime", memory="staged")
    assert not staged.sessions
    found = staged("fox", **SMALL).images
    assert set(staged.sessions) == {"vae_decoder", "postprocess"}
    wanted = SanaRuntime.from_pretrained(tiny_bundle, backend="onnxruntime")("fox", **SMALL).images
    assert found == wanted
