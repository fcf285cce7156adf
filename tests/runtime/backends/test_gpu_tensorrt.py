"""The device layer and TensorRT-RTX engines on a GPU, against ONNX Runtime on the CPU. Nothing here has been run yet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_export.manifest import Manifest
from sana_export.profiles import Profile
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
    profile = Profile("two sizes", (1, 1, 2), (1, 2, 3), ((96, 96), (96, 160)))
    graphs = [name for name in Manifest.load(tiny_bundle).graphs if name not in ("vae_decoder_head", "vae_decoder_tail")]
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


#: With kernels that are compiled before they run, the same request gives the same bits.
EXACT: dict[str, Any] = {"backend_options": {"dynamic_shapes_kernel_specialization_strategy": "eager"}}
OTHERS: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 1.0},
    "PAG": {"pag_scale": 2.0},
    "images": {"num_images_per_prompt": 2},
    "size": {"width": 96},
    "text": {"prompt": "a very detailed painting of a house by the lake, " * 10},
    "steps": {"num_inference_steps": 3},
    "step by step": {"callback_on_step_end": lambda *_: None},
}


def latents(runtime: SanaRuntime, **changes: Any) -> Any:
    request = {"prompt": "a red fox", "seed": 1, **REQUEST, **changes}
    return runtime(**{**request, "output_type": "latent"}).images


def test_captured_steps_stay_valid_whatever_runs_in_between(bundle: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    with SanaRuntime.from_pretrained(bundle, backend="tensorrt-rtx", memory="resident", **EXACT) as runtime:
        first = latents(runtime)
        others = {name: latents(runtime, **changes) for name, changes in OTHERS.items()}
        for name, changes in OTHERS.items():
            np.testing.assert_array_equal(latents(runtime, **changes), others[name], err_msg=name)
            np.testing.assert_array_equal(latents(runtime), first, err_msg=f"after {name}")


def test_steps_give_the_same_latents_however_they_are_captured(bundle: Path) -> None:
    """As one graph, as a graph for each step, and not at all."""
    pytest.importorskip("tensorrt_rtx")
    with SanaRuntime.from_pretrained(bundle, backend="tensorrt-rtx", memory="resident", **EXACT) as runtime:
        together, alone = latents(runtime), latents(runtime, callback_on_step_end=lambda *_: None)
    with SanaRuntime.from_pretrained(bundle, backend="tensorrt-rtx", memory="staged", **EXACT) as runtime:
        enqueued = latents(runtime)
    np.testing.assert_array_equal(together, enqueued)
    np.testing.assert_array_equal(alone, enqueued)


@pytest.mark.parametrize("options", [{"cuda_graph_strategy": "whole_graph_capture"}, {"text_multiple": 1}], ids=str)
def test_options_change_no_image(bundle: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("tensorrt_rtx")
    reference = SanaRuntime.from_pretrained(bundle, backend=on_the_cpu)
    with SanaRuntime.from_pretrained(bundle, backend="tensorrt-rtx", backend_options=options) as runtime:
        for seed in range(3):
            found, wanted = (by("a red fox", seed=seed, **REQUEST).images for by in (runtime, reference))
            assert -10.0 * np.log10(np.mean((found - wanted) ** 2)) >= LEAST_PSNR_DB, seed


@pytest.mark.parametrize("memory", ["resident", "staged"])
def test_a_closed_runtime_leaves_no_memory_taken(bundle: Path, device: CudaDevice, memory: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    taken = []
    for _ in range(3):
        with SanaRuntime.from_pretrained(bundle, backend="tensorrt-rtx", memory=memory) as runtime:
            runtime("a red fox", seed=1, **REQUEST)
        device.trim()
        taken.append(device.free_bytes())
    # What the first runtime leaves is the module's own: code and its workspaces.
    assert taken[2] >= taken[1] - (1 << 20)
