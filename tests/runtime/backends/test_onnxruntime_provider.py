"""Which provider ONNX Runtime runs on: never silently on the CPU if there is a GPU, or if a GPU is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sana_export import machine
from sana_export.bench.candidates import runtime as candidate
from sana_export.bench.candidates.table import Job
from sana_export.bench.workload import Workload
from sana_export.errors import ArtifactError, DependencyError, SanaExportError, UsageError
from sana_export.machine import Gpu
from sana_export.manifest import Options
from sana_export.runtime.backends import onnxruntime_provider as provider
from sana_export.runtime.backends import open_backend
from sana_export.runtime.backends.base import BackendSettings
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from tests.support.small_bundles import write_bundle


def gpu_package(preloaded: list[str]) -> Any:
    """The module of onnxruntime-gpu, as far as the choice reads it."""

    def preload_dlls() -> None:
        preloaded.append("cuda")
        print("Failed to load libcudnn.so.9")  # noqa: T201 (as the real one does)

    return SimpleNamespace(get_available_providers=lambda: [provider.CUDA, provider.CPU], preload_dlls=preload_dlls)


GPU = Gpu("a GPU", "8.9")


@pytest.mark.parametrize(("gpus", "wanted"), [((GPU,), provider.CUDA), ((), provider.CPU)])
def test_cuda_is_chosen_if_there_is_a_gpu_and_its_libraries_are_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gpus: tuple[Gpu, ...], wanted: str
) -> None:
    preloaded = list[str]()
    monkeypatch.setattr(machine, "ask_cuda", lambda: (gpus, None))
    assert provider.choose_provider(gpu_package(preloaded)) == wanted
    assert preloaded == (["cuda"] if gpus else [])
    assert capsys.readouterr().out == ""


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ask_cuda", lambda: ((GPU, GPU), None))
    assert provider.choose_provider(gpu_package([]), 1) == provider.CUDA
    with pytest.raises(UsageError, match="there is no GPU 2") as caught:
        provider.choose_provider(gpu_package([]), 2)
    assert caught.value.found == "0: a GPU, 1: a GPU"


@pytest.mark.parametrize(("error", "level"), [(None, "INFO"), ("CUDA_ERROR_NO_DEVICE", "INFO"), ("CUDA_ERROR_UNKNOWN", "WARNING")])
def test_a_broken_driver_is_news(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: str | None, level: str
) -> None:
    monkeypatch.setattr(machine, "ask_cuda", lambda: ((), error))
    with caplog.at_level("INFO"):
        assert provider.choose_provider(gpu_package([])) == provider.CPU
    (record,) = caplog.records
    assert record.levelname == level
    assert (error or "no driver") in record.getMessage()


def test_the_cpu_package_never_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ask_cuda", lambda: pytest.fail("asked"))
    assert provider.choose_provider(onnxruntime) == provider.CPU


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has two GPUs and onnxruntime-gpu, whose CUDA provider cannot start."""
    monkeypatch.setattr(machine, "ask_cuda", lambda: ((GPU, GPU), None))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider.CUDA, provider.CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda-graphs"])
def test_a_provider_that_cannot_start_is_an_error_that_names_the_missing_libraries(
    tmp_path: Path, with_gpus: None, backend: str
) -> None:
    opened = open_backend(backend, tmp_path, write_bundle(tmp_path))
    assert opened.device == "cuda"
    with pytest.raises(DependencyError, match="could not start its CUDAExecutionProvider while loading sampler") as caught:
        opened.load("sampler")
    assert "CPUExecutionProvider" in str(caught.value.found)
    assert 'pip install --force-reinstall "onnxruntime-gpu[cuda,cudnn]"' in str(caught.value.fix)


#: What ONNX Runtime 1.31.1 reported on an H100.
CUDA_FAILED = "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize(stream_);"
MEMORY_FULL = "CUBLAS failure 3: the resource allocation failed ; GPU=0 ; expr=cublasCreate(&cublas_handle_);"


@pytest.mark.parametrize(
    ("reported", "title", "fix"),
    [(CUDA_FAILED, "CUDA failed while", "start the program again"), (MEMORY_FULL, "out of memory while", "free memory")],
)
def test_what_failed_in_cuda_is_not_called_a_missing_library(
    tmp_path: Path, with_gpus: None, monkeypatch: pytest.MonkeyPatch, reported: str, title: str, fix: str
) -> None:
    """After an error of CUDA, ONNX Runtime puts new sessions on the CPU without a word, and every copy to the GPU fails."""

    def fail(*_: Any) -> None:
        raise RuntimeError(reported)

    opened = open_backend("onnxruntime", tmp_path, write_bundle(tmp_path))
    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", fail)
    for work in (lambda: opened.load("sampler"), lambda: opened.to_device(np.zeros(1, np.float32))):
        with pytest.raises(DependencyError, match=title) as caught:
            work()
        assert fix in str(caught.value.fix)
        assert "GPU=0" in str(caught.value.found)


@pytest.mark.parametrize("backend", ["onnxruntime", "onnxruntime-cuda-graphs"])
@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({"arena_extend_strategy": "kNextPowerOfTwo"}, {"arena_extend_strategy": "kNextPowerOfTwo"}),
        ({"prefer_nhwc": 1, "use_tf32": 1}, {"prefer_nhwc": "1", "use_tf32": "1"}),
    ],
)
def test_the_options_of_the_cuda_provider(
    tmp_path: Path, with_gpus: None, monkeypatch: pytest.MonkeyPatch, backend: str, given: dict[str, Any], changes: dict[str, str]
) -> None:
    seen: list[Any] = []

    def make(path: str, options: Any, providers: list[Any]) -> Any:
        seen.append(dict(entry for entry in providers if isinstance(entry, tuple)))
        raise RuntimeError("no CUDA here")

    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    options = {"provider_options": given}
    opened = open_backend(backend, tmp_path, write_bundle(tmp_path), BackendSettings(device=1, options=options))
    with pytest.raises(ArtifactError, match="cannot load"):
        opened.load("sampler")
    wanted = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested", "device_id": "1", **changes}
    assert seen[-1] == {provider.CUDA: wanted}
    captured = {"enable_cuda_graph": "1"}
    assert seen[:-1] == ([{provider.CUDA: wanted | captured}] if backend.endswith("graphs") else [])


@pytest.mark.parametrize(("backend", "device"), [("onnxruntime-cuda-graphs", None), ("onnxruntime", 0)])
def test_asking_for_a_gpu_without_one_is_an_error(tmp_path: Path, backend: str, device: int | None) -> None:
    with pytest.raises(DependencyError, match="but onnxruntime runs on the CPU here") as caught:
        open_backend(backend, tmp_path, write_bundle(tmp_path), BackendSettings(device=device))
    assert "CPUExecutionProvider" in str(caught.value.found)


@pytest.mark.parametrize("name", [provider.CPU, provider.CUDA])
def test_no_provider_runs_bf16(tmp_path: Path, name: str) -> None:
    manifest = replace(write_bundle(tmp_path), options=Options("bf16", clamp=False, pag_layers=()))
    with pytest.raises(ArtifactError, match=f"cannot run on onnxruntime's {name}") as caught:
        OnnxRuntimeBackend(tmp_path, manifest, provider=provider.BuiltInProvider(name))
    assert caught.value.wanted == "fp32 or fp16"
    assert "--dtype fp32" in str(caught.value.fix)


def test_a_time_of_the_cpu_is_never_reported_as_one_of_a_gpu(tiny_bundle: Path) -> None:
    workload = Workload("w", 64, 64, 1, 4.5, ("a fox",), device="cuda")
    job = Job("onnxruntime", str(tiny_bundle), "", None, "fp32", False, (), 1, workload)
    with pytest.raises(SanaExportError, match="does not compute where the workload runs") as caught:
        candidate.load(job)
    assert caught.value.found == "onnxruntime on the cpu"
    assert caught.value.wanted == "onnxruntime on the cuda"
