"""The errors if engines cannot run: no driver, another version, GPU or system, damage, too little memory."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.installation import install_command
from sana_export.machine import Gpu, gpu_compute_capability
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import open_backend
from sana_export.runtime.backends.cuda import CudaDevice, cuda_error
from sana_export.runtime.backends.tensorrt import TensorRTBackend
from sana_export.trt.compatibility import Host
from tests.support.host_device import HostDevice
from tests.support.host_tensorrt import EngineInvalidityDiagnostics, HostTensorRT, with_engines

WIDE = Profile("wide", (1, 1, 8), (1, 2, 3), ((32, 32), (512, 512)))
SMALL: dict[str, Any] = {"height": 96, "width": 160, "use_resolution_binning": False, "num_inference_steps": 2, "seed": 1}
HERE = Host((Gpu("Host GPU 1", "8.9"),), {"tensorrt-rtx": "1.7.1.116"}, "linux-x86_64")


DOCTOR = "run sana-export doctor to see what was found, or use --backend onnxruntime, which needs no GPU"
INSTALL = 'pip install "tensorrt-rtx>=1.7"'
OTHERS = "use --backend tensorrt or onnxruntime or onnxruntime-cuda-graphs or torch or torch-compile"
BUILD = "sana-export build {bundle} --backend tensorrt-rtx"


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE)
    return copy


@pytest.fixture
def module() -> HostTensorRT:
    return HostTensorRT(HostDevice())


def opened(bundle: Path, module: HostTensorRT, machine: Host = HERE, **options: Any) -> SanaRuntime:
    def backend(bundle: Path, manifest: Any) -> TensorRTBackend:
        return TensorRTBackend(bundle, manifest, "tensorrt-rtx", module=module, device=module.device, machine=machine)

    return SanaRuntime.from_pretrained(bundle, backend=backend, **options)


def complete_text(error: SanaExportError) -> str:
    assert error.found is not None
    assert error.wanted is not None
    assert error.fix is not None
    return str(error)


@pytest.mark.skipif(gpu_compute_capability() is not None, reason="there is a GPU")
def test_no_driver() -> None:
    """The real cuda-core on a machine without a driver."""
    pytest.importorskip("cuda.core")
    with pytest.raises(DependencyError, match="opening the GPU failed") as caught:
        CudaDevice()
    assert "install NVIDIA's driver" in complete_text(caught.value)
    assert "--backend onnxruntime" in complete_text(caught.value)


def test_no_cuda_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(DependencyError) as caught:
        CudaDevice()
    assert install_command("tensorrt-rtx") in complete_text(caught.value)


def test_an_error_that_nothing_is_known_about_is_not_explained_away() -> None:
    text = complete_text(cuda_error("copying to the GPU", "CUDA_ERROR_NEW: something\nmore"))
    assert text.startswith("the GPU cannot be used: copying to the GPU failed\n  found:  CUDA_ERROR_NEW: something\n  wanted:")
    assert "sana-export doctor --json" in text
    assert "install" not in text


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("CUDA initialization failure with error: 35", "update NVIDIA's driver"),
        ("Error Code 1: Cuda Runtime (In f at x.cpp:250 (cudaError 500: named symbol not found))", "update NVIDIA's driver"),
        ("Error Code 1: Cuda Runtime (no CUDA-capable device is detected)", "CUDA_VISIBLE_DEVICES"),
        ("Error Code 1: Cuda Runtime (system not yet initialized)", "nvidia-fabricmanager"),
        ("(cudaError 803: system has unsupported display driver / cuda driver combination)", "restart the machine"),
        ("CUDA error 999", "nvidia-smi"),
    ],
)
def test_an_error_of_cuda_is_not_the_engines_fault(bundle: Path, module: HostTensorRT, said: str, fix: str) -> None:
    module.cannot_load = said
    with pytest.raises(DependencyError, match="loading the engine of text_encoder failed: CUDA does not work here") as caught:
        opened(bundle, module)
    assert said in complete_text(caught.value)
    assert fix in str(caught.value.fix)
    assert caught.value.exit_code == 3


def test_an_engine_that_cannot_say_how_much_memory_it_needs(bundle: Path, module: HostTensorRT) -> None:
    runtime = opened(bundle, module)
    module.cannot_size = "Error Code 3: API Usage Error (a shape is missing)"
    with pytest.raises(ArtifactError, match="sizing the memory of the engine of text_encoder failed") as caught:
        runtime("fox", height=96, width=160, use_resolution_binning=False, num_inference_steps=1)
    assert caught.value.found == module.cannot_size


def test_other_errors_while_loading_are_the_engines_fault(bundle: Path, module: HostTensorRT) -> None:
    module.cannot_load = "Error Code 1: Serialization (magic tag)"
    with pytest.raises(ArtifactError, match="loading the engine of text_encoder failed in host_tensorrt") as caught:
        opened(bundle, module)
    assert caught.value.fix == BUILD.format(bundle=bundle)


@pytest.mark.parametrize(
    ("machine", "engine", "found", "fix"),
    [
        ({"gpus": ()}, {}, "no NVIDIA GPU and driver here", DOCTOR),
        (
            {"gpus": (), "cuda_error": "CUDA_ERROR_SYSTEM_NOT_READY"},
            {},
            "NVIDIA's driver finds no GPU here: CUDA_ERROR_SYSTEM_NOT_READY",
            "start NVIDIA's fabric manager, which GPUs with NVSwitch need: sudo systemctl start nvidia-fabricmanager",
        ),
        ({"gpus": (Gpu("H100", "9.0"),)}, {}, "TensorRT-RTX does not support compute capability 9.0", OTHERS),
        ({"gpus": (Gpu("RTX 2080", "7.5"),)}, {}, "here is 7.5", f"{BUILD} --compute-capability 7.5"),
        ({"versions": {"tensorrt-rtx": "1.8"}}, {}, "built with TensorRT-RTX 1.7.1.116, here is 1.8", BUILD),
        ({"versions": {}}, {}, "TensorRT-RTX is not installed", INSTALL),
        ({"gpus": (), "versions": {}}, {}, "TensorRT-RTX is not installed", f"{DOCTOR}; {INSTALL}"),
        ({}, {"operating_system": "windows-amd64"}, "built on windows-amd64, here is linux-x86_64", BUILD),
        ({"gpus": ()}, {"operating_system": "windows-amd64"}, "no NVIDIA GPU and driver here", BUILD),
    ],
)
def test_engines_that_do_not_run_here(
    tiny_bundle: Path, tmp_path: Path, module: HostTensorRT, machine: dict[str, Any], engine: dict[str, Any], found: str, fix: str
) -> None:
    """If the machine lacks a GPU or a package, engines are built again only if the present ones would not run then either."""
    copy = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with_engines(copy, WIDE, **engine)
    with pytest.raises(ArtifactError) as caught:
        opened(copy, module, dataclasses.replace(HERE, **machine))
    assert found in complete_text(caught.value)
    assert caught.value.fix == fix.format(bundle=copy)


def test_a_bundle_without_engines(tiny_bundle: Path, module: HostTensorRT) -> None:
    with pytest.raises(ArtifactError, match="none was built") as caught:
        opened(tiny_bundle, module)
    assert caught.value.exit_code == 4


def test_auto_uses_engines_only_if_they_run(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana_export.trt import compatibility

    manifest = Manifest.load(bundle)
    taken: list[str] = []
    monkeypatch.setattr(
        "sana_export.runtime.backends.BACKENDS",
        {name: lambda *_, name=name: taken.append(name) for name in ("onnxruntime", "tensorrt-rtx", "tensorrt")},
    )
    for machine in (HERE, dataclasses.replace(HERE, gpus=())):
        monkeypatch.setattr(compatibility, "detect_host", lambda device, machine=machine: machine)
        open_backend("auto", bundle, manifest)
    open_backend("auto", bundle, dataclasses.replace(manifest, engines=()))
    assert taken == ["tensorrt-rtx", "onnxruntime", "onnxruntime"]


@pytest.mark.parametrize(
    ("diagnostic", "kind", "word"),
    [
        ("VERSION_MISMATCH", ArtifactError, "from another version"),
        ("UNSUPPORTED_CC", ArtifactError, "for another GPU"),
        ("MALFORMED_ENGINE", ArtifactError, "damaged"),
        ("OLD_CUDA_DRIVER", DependencyError, "update NVIDIA's driver"),
        ("INSUFFICIENT_GPU_MEMORY", DependencyError, "--memory staged"),
        ("CUDA_ERROR", DependencyError, "sana-export doctor"),
    ],
)
def test_what_the_module_says_of_an_engine(
    bundle: Path, module: HostTensorRT, diagnostic: str, kind: type[SanaExportError], word: str
) -> None:
    module.diagnostics = EngineInvalidityDiagnostics[diagnostic]
    with pytest.raises(kind) as caught:
        opened(bundle, module)
    assert diagnostic in complete_text(caught.value)
    assert word in complete_text(caught.value)
    assert "Host GPU 1" in complete_text(caught.value)


def test_a_damaged_engine(bundle: Path, module: HostTensorRT) -> None:
    path = next(bundle.rglob("denoiser.engine"))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match=r"denoiser\.engine is damaged") as caught:
        opened(bundle, module)
    assert f"sana-export build {bundle} --backend tensorrt-rtx" in complete_text(caught.value)


@pytest.mark.parametrize("when", ["loading", "running"])
def test_out_of_memory(bundle: Path, module: HostTensorRT, when: str) -> None:
    runtime = opened(bundle, module) if when == "running" else None
    module.out_of_memory = when
    with pytest.raises(DependencyError, match=f"out of GPU memory while {when} the engine of text_encoder") as caught:
        (runtime or opened(bundle, module))("fox", **SMALL)
    assert "out of memory" in str(caught.value.found)
    assert "bytes free" in complete_text(caught.value)
    assert "--memory staged" in complete_text(caught.value)
    if runtime is not None:
        module.out_of_memory = ""
        assert runtime("fox", **SMALL).images, "the runtime works afterwards"


def test_no_memory_for_what_an_engine_works_in(bundle: Path) -> None:
    module = HostTensorRT(HostDevice())
    runtime = opened(bundle, module, memory="resident")
    runtime.sessions.require(["vae_decoder"])
    module.device.capacity = module.device.used + 350_000  # instruction and prompt fit
    with pytest.raises(DependencyError, match="out of GPU memory while running the engine of text_encoder"):
        runtime("fox", **SMALL)
    module.device.capacity = 1 << 40
    runtime("fox", **SMALL)


def test_a_request_outside_all_profiles_says_what_is_possible(bundle: Path, module: HostTensorRT) -> None:
    runtime = opened(bundle, module)
    runs = len(module.runs)
    with pytest.raises(UsageError) as caught:
        runtime("fox", **{**SMALL, "height": 1024, "width": 768})
    text = complete_text(caught.value)
    assert "1 images of 1024x768 (height x width), 2 guidance branches" in text
    assert "denoiser (wide): batch 1 to 8, branches 1 to 3, height 32 to 512 px, width 32 to 512 px" in text
    assert f"fix:    sana-export build {bundle} --backend tensorrt-rtx --height 1024 --width 768 --batch 1" in text
    with pytest.raises(UsageError, match="9 images of 96x160"):
        runtime("fox", **SMALL, num_images_per_prompt=9)
    assert len(module.runs) == runs, "nothing ran before the check"


def test_shapes_beyond_an_engine_are_named(bundle: Path, module: HostTensorRT) -> None:
    session = opened(bundle, module).sessions["context"]
    with pytest.raises(UsageError) as caught:
        session.run({"prompt_embeds": np.zeros((4, 9, 1, 64), np.float32)})
    text = complete_text(caught.value)
    assert "wide: outside what the engine was built for" in text
    assert "text_branches 4 (possible: 1 to 2)" in text
    assert "batch 9 (possible: 1 to 8)" in text


def test_a_decoder_that_was_not_built(bundle: Path, module: HostTensorRT) -> None:
    manifest = Manifest.load(bundle)
    kept = tuple(engine for engine in manifest.engines if engine.graph not in ("vae_decoder_head", "vae_decoder_tail"))
    dataclasses.replace(manifest, engines=kept).save(bundle)
    runtime = opened(bundle, module)
    runtime("fox", **SMALL)
    with pytest.raises(UsageError, match="no engine of vae_decoder_head; no engine of vae_decoder_tail"):
        runtime("fox", **SMALL, decoder_tile=64)


def test_the_narrowest_engine_runs(bundle: Path, module: HostTensorRT) -> None:
    """The profile closest to the request runs. Engines that are neither used nor typical are not loaded."""
    exact = Profile("exact", (1, 1, 1), (2, 2, 2), ((96, 160),))
    with_engines(bundle, exact)
    runtime = opened(bundle, module)
    loads = module.loads
    runtime("fox", **SMALL)
    # Those of the size were loaded beside the typical ones; text encoder and context do not depend on it.
    assert {engine.entry.profile for engine in runtime.sessions["denoiser"].loaded.values()} == {"wide", "exact"}
    assert module.loads > loads
    after = module.loads
    runtime("fox", **{**SMALL, "height": 128})
    assert module.loads == after
    found = runtime.backend.engines
    axes = {"batch": 1, "branches": 2, "latent_height": 3, "latent_width": 5}
    assert found.engine_for("denoiser", axes).profile == "exact"
    assert found.engine_for("denoiser", {**axes, "branches": 3}).profile == "wide"
    assert found.engine_for("denoiser", {**axes, "latent_height": 17}) is None
