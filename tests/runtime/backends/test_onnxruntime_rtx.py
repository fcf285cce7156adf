"""ONNX Runtime's TensorRT-RTX provider: what it is given, and what is said if it is missing. No GPU has run it.

With `stand_in`, the CPU's provider takes its place: the real ONNX Runtime loads the graphs with all that the provider would get.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from sana_export import machine
from sana_export.errors import DependencyError, UsageError
from sana_export.machine import Gpu
from sana_export.manifest import Manifest
from sana_export.profiles import PROFILES
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends import onnxruntime_provider, onnxruntime_rtx, open_backend
from sana_export.runtime.backends.base import BackendSettings
from sana_export.runtime.backends.onnxruntime_provider import RTX
from sana_export.trt.plan import onnx_sha256

ADA = Gpu("a GPU", "8.9")


def gpus(monkeypatch: pytest.MonkeyPatch, *found: Gpu, error: str | None = None) -> None:
    monkeypatch.setattr(machine, "ask_cuda", lambda: (found, error))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, str]]]:
    """A GPU, and a provider of that name which is the CPU's. What its sessions are given."""
    gpus(monkeypatch, ADA)
    device, given, entries = SimpleNamespace(ep_name=RTX), list[tuple[Any, dict[str, str]]](), list[tuple[str, str]]()
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [device])
    monkeypatch.setattr(
        onnxruntime.SessionOptions,
        "add_provider_for_devices",
        lambda self, devices, options: given.append((devices[0], options | {"entries": dict(entries)})),
    )
    monkeypatch.setitem(onnxruntime_provider.DEVICES, RTX, "cpu")
    add_entry = onnxruntime.SessionOptions.add_session_config_entry

    def add_allowed_entry(self: Any, name: str, value: str) -> None:
        """Everything runs on the CPU here, so that must not be forbidden."""
        entries.append((name, value))
        if name != "session.disable_cpu_ep_fallback":
            add_entry(self, name, value)

    monkeypatch.setattr(onnxruntime.SessionOptions, "add_session_config_entry", add_allowed_entry)
    return given


@pytest.fixture
def own(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A copy of the bundle, because kernels are written into it."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def test_it_draws_what_onnxruntime_draws(own: Path, tiny_runtime: SanaRuntime, stand_in: Any) -> None:
    request: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "seed": 4, "output_type": "np"}
    with SanaRuntime.from_pretrained(own, backend="onnxruntime-tensorrt-rtx") as runtime:
        got = runtime("a fox", **request).images
        assert runtime.backend.name == "onnxruntime-tensorrt-rtx"
    np.testing.assert_allclose(got, tiny_runtime("a fox", **request).images, atol=1e-5)
    assert len(stand_in) == 6
    assert {id(device) for device, _ in stand_in} == {id(onnxruntime.get_ep_devices()[0])}


def test_nothing_runs_on_the_cpu_instead(own: Path, stand_in: Any) -> None:
    onnxruntime_rtx.OnnxRuntimeRtxBackend(own, Manifest.load(own)).load("sampler")
    assert stand_in[0][1]["entries"]["session.disable_cpu_ep_fallback"] == "1"


def test_graphs_are_compiled_for_the_shapes_of_the_profile(own: Path, stand_in: Any) -> None:
    manifest = Manifest.load(own)
    backend = onnxruntime_rtx.OnnxRuntimeRtxBackend(own, manifest)
    ranges = backend.ranges("denoiser")
    backend.load("denoiser")
    ((_, options),) = stand_in
    side = [ranges["latent_height"][position] for position in range(3)]
    channels = manifest.model.latent_channels
    for kind, batch, length in zip(("min", "opt", "max"), (1, 1, 4), side, strict=True):
        shapes = dict(shape.split(":") for shape in options[f"nv_profile_{kind}_shapes"].split(","))
        assert shapes["latents"] == f"{batch}x{channels}x{length}x{length}"
        assert shapes.keys() == {"latents", "context", "context_mask", "perturbed", "source"}  # timestep has one shape
    branches = PROFILES["default"].branches
    assert ranges["branches"] == branches


def test_options_of_the_caller_reach_the_provider(own: Path, stand_in: Any) -> None:
    settings = BackendSettings(options={"provider_options": {"enable_cuda_graph": 1}, "profile": "static-64"})
    open_backend("onnxruntime-tensorrt-rtx", own, Manifest.load(own), settings).load("sampler")
    ((_, options),) = stand_in
    assert options["enable_cuda_graph"] == "1"
    assert "latents:1x32x2x2" in options["nv_profile_max_shapes"]


def test_kernels_are_kept_in_the_bundle(own: Path, stand_in: Any) -> None:
    backend = onnxruntime_rtx.OnnxRuntimeRtxBackend(own, Manifest.load(own))
    backend.load("sampler")
    folder = Path(stand_in[0][1]["nv_runtime_cache_path"])
    assert folder.is_dir()
    assert folder.parent == own / "engines" / "onnxruntime-tensorrt-rtx"
    assert Manifest.load(own) == backend.manifest  # and they are not part of it


@pytest.mark.parametrize("place", [".", "HASH", "HASH/kernels.cache"])
def test_a_link_in_the_place_of_the_kernels_is_not_followed(own: Path, tmp_path: Path, stand_in: Any, place: str) -> None:
    manifest, outside = Manifest.load(own), tmp_path / "outside"
    outside.mkdir()
    kernels = own / "engines" / "onnxruntime-tensorrt-rtx"
    link = kernels / place.replace("HASH", onnx_sha256(manifest.graphs["sampler"])[:12])
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside)
    onnxruntime_rtx.OnnxRuntimeRtxBackend(own, manifest).load("sampler")
    assert "nv_runtime_cache_path" not in stand_in[0][1]
    assert list(outside.iterdir()) == []


def test_a_request_outside_the_profile_is_refused(own: Path, stand_in: Any) -> None:
    runtime = SanaRuntime.from_pretrained(own, backend="onnxruntime-tensorrt-rtx")
    with pytest.raises(UsageError, match="the profile default does not cover this request") as caught:
        runtime("a fox", num_images_per_prompt=5, num_inference_steps=1)
    assert "batch 5 (possible: 1 to 4)" in str(caught.value.found)
    assert "backend_options={'profile': 'datacenter'}" in str(caught.value.fix)


def test_what_no_profile_covers_runs_without_one(own: Path, stand_in: Any) -> None:
    runtime = SanaRuntime.from_pretrained(own, backend="onnxruntime-tensorrt-rtx")
    with pytest.raises(UsageError) as caught:
        runtime("a fox", num_images_per_prompt=9, num_inference_steps=1)
    assert caught.value.fix == "--backend onnxruntime"


@pytest.mark.parametrize(("profile", "found"), [(7, "7"), ("laptops", None)])
def test_a_profile_that_does_not_exist(tiny_bundle: Path, stand_in: Any, profile: Any, found: str | None) -> None:
    with pytest.raises(UsageError, match="profile") as caught:
        onnxruntime_rtx.OnnxRuntimeRtxBackend(
            tiny_bundle, Manifest.load(tiny_bundle), BackendSettings(options={"profile": profile})
        )
    assert caught.value.found == found


def missing(bundle: Path, device: int | None = None) -> DependencyError:
    with pytest.raises(DependencyError) as caught:
        open_backend("onnxruntime-tensorrt-rtx", bundle, Manifest.load(bundle), BackendSettings(device=device))
    return caught.value


def test_without_a_gpu_it_says_so(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch)
    error = missing(tiny_bundle)
    assert (error.message, error.found) == ("the backend onnxruntime-tensorrt-rtx needs an NVIDIA GPU", "no NVIDIA GPU and driver")
    assert "--backend onnxruntime, which needs no GPU" in str(error.fix)


def test_an_unsupported_gpu_is_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, ADA, Gpu("an H100", "9.0"))
    error = missing(tiny_bundle, 1)
    assert error.message == "the backend onnxruntime-tensorrt-rtx does not run on an H100"
    assert "only 8.6, 8.9, 12.0, 12.1" in str(error.wanted)
    assert "onnxruntime-cuda-graphs" in str(error.fix)


def test_without_the_package_the_command_that_installs_it_is_named(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, ADA)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    error = missing(tiny_bundle)
    assert error.message == "the backend onnxruntime-tensorrt-rtx is not installed"
    assert "[cpu,onnxruntime-tensorrt-rtx]" in str(error.fix)


def test_a_library_that_onnxruntime_cannot_load_is_named(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real ONNX Runtime tries to load it, as it does where libcuda is missing."""
    gpus(monkeypatch, ADA)
    library = tmp_path / "libonnxruntime_providers_nv_tensorrt_rtx.so"
    package = SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: str(library))
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", package)
    error = missing(tiny_bundle)
    assert "cannot load onnxruntime-ep-nv-tensorrt-rtx" in error.message
    assert str(library) in str(error.found)
    assert "CUDA 13" in str(error.wanted)
