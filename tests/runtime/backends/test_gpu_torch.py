"""The torch backend and ONNX Runtime's CUDA graphs on a GPU, against ONNX Runtime on the CPU. Nothing here has been run yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from sana_export.manifest import Manifest
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend

pytestmark = pytest.mark.gpu

REQUEST: dict[str, Any] = {"height": 128, "width": 192, "use_resolution_binning": False, "num_inference_steps": 4}
#: fp32 images of a GPU and of a CPU, which sum in different orders.
PSNR_LIMIT = 40.0


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Path) -> SanaRuntime:
    def on_the_cpu(bundle: Path, manifest: Manifest) -> OnnxRuntimeBackend:
        return OnnxRuntimeBackend(bundle, manifest, provider="CPUExecutionProvider")

    return SanaRuntime.from_pretrained(tiny_bundle, backend=on_the_cpu)


def assert_same(found: SanaRuntime, wanted: SanaRuntime, prompt: str = "a red apple", **request: Any) -> None:
    one, other = (runtime(prompt, output_type="np", **{**REQUEST, "seed": 3, **request}).images for runtime in (found, wanted))
    assert -10.0 * np.log10(np.mean((one - other) ** 2)) >= PSNR_LIMIT


@pytest.fixture(params=["torch", "torch-compile", "onnxruntime-cuda-graphs"])
def runtime(request: pytest.FixtureRequest, tiny_bundle: Path) -> Any:
    if not torch.cuda.is_available() and request.param.startswith("torch"):
        pytest.skip("this PyTorch finds no GPU")
    if request.param.startswith("onnx") and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider (onnxruntime-gpu has)")
    with SanaRuntime.from_pretrained(tiny_bundle, backend=request.param) as runtime:
        assert runtime.backend.device == "cuda"
        yield runtime


def test_it_draws_what_the_cpu_draws(runtime: SanaRuntime, wanted: SanaRuntime) -> None:
    """Repeated after other prompts, seeds and shapes, so that work captured for one request is replayed for another."""
    requests: list[dict[str, Any]] = [
        {"guidance_scale": 4.5},
        {"prompt": "two blue birds on a wire", "seed": 8, "guidance_scale": 7.0},
        {"pag_scale": 2.0},
        {"num_images_per_prompt": 2, "seed": [5, 6]},
        {"height": 256, "width": 256, "decoder_tile": 128},
        {"guidance_scale": 4.5},
    ]
    for request in requests:
        assert_same(runtime, wanted, **request)


def test_callbacks_change_latents(runtime: SanaRuntime, wanted: SanaRuntime) -> None:
    def halve(_: Any, index: int, timestep: float, tensors: dict[str, Any]) -> Any:
        return {"latents": tensors["latents"] * np.float32(0.5)} if index == 0 else None

    assert_same(runtime, wanted, callback_on_step_end=halve)


def test_sprint(runtime: SanaRuntime, sprint_bundle: Path, sprint_runtime: SanaRuntime) -> None:
    with SanaRuntime.from_pretrained(sprint_bundle, backend=runtime.backend.name) as sprint:
        for seed in (1, 2):
            assert_same(sprint, sprint_runtime, num_inference_steps=2, seed=seed)


def test_time_is_the_device_s(runtime: SanaRuntime) -> None:
    timings = runtime("a fox", seed=1, **REQUEST).timings
    assert 0 < timings.denoise_loop < timings.total
    assert 0 < timings.vae_decoder < timings.total
