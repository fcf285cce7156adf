"""The device layer and TensorRT-RTX engines on a GPU, against ONNX Runtime on the CPU. Nothing here has been run yet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.profiles import custom_profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.cuda import CudaDevice
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from sana_export.trt.bundle import build_bundle

pytestmark = pytest.mark.gpu

REQUEST: dict[str, Any] = {
    "height": 96,
    "width": 160,
    "use_resolution_binning": False,
    "num_inference_steps": 4,
    "output_type": "np",
}
#: float32 graphs: products of a GPU in another order.
LEAST_PSNR_DB = 60.0


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice()


def test_copies_come_back_in_the_order_of_the_calls(device: CudaDevice) -> None:
    values = np.random.default_rng(0).normal(size=(1000, 33)).astype(np.float32)
    first, second = device.allocate(values.nbytes), device.allocate(values.nbytes)
    assert first.address % 256 == second.address % 256 == 0
    device.clear(second.address, values.nbytes)
    device.upload(first.address, values)
    device.copy(second.address, first.address, values.nbytes // 2)
    wanted = values.reshape(-1).copy()
    wanted[values.size // 2 :] = 0
    values[:] = 7  # an upload has taken what it needs
    found = np.empty(values.size, np.float32)
    device.download(second.address, found)
    np.testing.assert_array_equal(found, wanted)
    assert device.free_bytes() > 0


def test_captured_work_is_done_again_with_new_values(device: CudaDevice) -> None:
    source, target = device.allocate(4096), device.allocate(4096)
    found = np.empty(1024, np.float32)
    replay = device.capture(lambda: device.copy(target.address, source.address, 4096))
    for value in (1.0, 2.0):
        device.upload(source.address, np.full(1024, value, np.float32))
        replay()
        device.download(target.address, found)
        assert (found == value).all()


def test_time_passes(device: CudaDevice) -> None:
    big = device.allocate(1 << 28)
    start = device.record_event()
    for _ in range(10):
        device.clear(big.address, 1 << 28)
    assert 0 < device.seconds(start, device.record_event()) < 1


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("engines") / "bundle")
    runtime = SanaRuntime.from_pretrained(tiny_bundle, backend=on_the_cpu)
    profile = custom_profile(runtime.manifest.model, height=96, width=160, batch=2)
    graphs = [name for name in runtime.manifest.graphs if name not in ("vae_decoder_head", "vae_decoder_tail")]
    build_bundle(copy, backend="tensorrt-rtx", profile=profile, graphs=graphs)
    return copy


def on_the_cpu(bundle: Path, manifest: Any) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, manifest, provider="CPUExecutionProvider")


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_engines_draw_what_onnxruntime_draws(bundle: Path, memory: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    reference = SanaRuntime.from_pretrained(bundle, backend=on_the_cpu)
    with SanaRuntime.from_pretrained(bundle, backend="tensorrt-rtx", memory=memory) as runtime:
        cases = ({"seed": 1}, {"seed": 2}, {"seed": 2, "guidance_scale": 1.0}, {"seed": 3, "pag_scale": 2.0})
        for prompt, options in [(prompt, options) for prompt in ("a red fox", "一只可爱的熊猫") for options in cases]:
            found = runtime(prompt, **REQUEST, **options).images
            wanted = reference(prompt, **REQUEST, **options).images
            assert -10.0 * np.log10(np.mean((found - wanted) ** 2)) >= LEAST_PSNR_DB, (prompt, options)
            timings = runtime(prompt, **REQUEST, **options).timings
            assert 0 < timings.denoise_loop < timings.total
    caches = list(bundle.rglob("*.cache"))
    assert {path.name.split(".")[0] for path in caches} >= {"denoiser", "text_encoder"}
