"""What every backend must do on a GPU, against ONNX Runtime on the CPU. What cannot run here is skipped with the reason."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sana_export.bench.gpu_check import find
from sana_export.bench.gpu_check.suite import BACKEND_VARIABLE
from sana_export.errors import DependencyError
from sana_export.gpu_support import unsupported_reason
from sana_export.machine import find_cuda_error, gpu_compute_capability
from sana_export.manifest import Manifest
from sana_export.profiles import Profile
from sana_export.runtime import SanaRuntime
from sana_export.runtime.backends.base import CapturingBackend
from sana_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from sana_export.runtime.backends.onnxruntime_provider import CPU, BuiltInProvider
from sana_export.runtime.backends.torch import require_compiler
from sana_export.trt.bundle import build_bundle
from sana_export.trt.flavour import FLAVOURS
from sana_export.trt.options import BuildOptions

pytestmark = pytest.mark.gpu

SMALL: dict[str, Any] = {"height": 128, "width": 192, "use_resolution_binning": False, "num_inference_steps": 4, "seed": 3}
#: fp32 images of a GPU and of a CPU, which sum in different orders.
PSNR_LIMIT = 40.0
#: Every backend, and the modules that it needs.
BACKENDS = {
    "torch": ("torch",),
    "torch-compile": ("torch", "triton"),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-cuda-graphs": ("onnxruntime",),
    "onnxruntime-tensorrt-rtx": ("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime"),
    "tensorrt": ("tensorrt", "cuda.core"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda.core"),
}
#: Why a module cannot use the GPU. TensorRT's say so only when an engine is loaded.
REASONS: dict[str, Callable[[Any], str | None]] = {"torch": find.no_torch, "onnxruntime": find.no_cuda_provider}
PROFILE = Profile("tests", (1, 1, 2), (1, 2, 3), ((128, 192), (256, 256)))
#: Images of one backend in two sizes, with and without PAG and guidance: the shapes that work is captured for.
REQUESTS: dict[str, dict[str, Any]] = {
    "guidance": {},
    "PAG": {"pag_scale": 2.0},
    "no guidance": {"guidance_scale": 1.0},
    "two images": {"num_images_per_prompt": 2, "seed": [5, 6]},
    "another size": {"height": 256, "width": 256},
    "another prompt": {"prompt": "two blue birds on a wire", "guidance_scale": 7.0},
    "fewer steps": {"num_inference_steps": 3},
    "guidance in an interval": {"guidance_interval": (0.25, 0.75), "pag_scale": 2.0, "pag_interval": (0, 0.5)},
}
#: With these options an image has the same bits from the first time on: by default, TensorRT-RTX exchanges kernels between images.
EXACT: dict[str, dict[str, Any]] = {"tensorrt-rtx": {"dynamic_shapes_kernel_specialization_strategy": "eager"}}


def on_the_cpu(bundle: Path, manifest: Manifest) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(bundle, manifest, provider=BuiltInProvider(CPU))


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Path) -> SanaRuntime:
    return SanaRuntime.from_pretrained(tiny_bundle, backend=on_the_cpu)


def why_not(backend: str) -> str | None:
    """Why `backend` cannot run on the GPU of this machine. None if it can."""
    capability = gpu_compute_capability()
    if capability is None:
        return find_cuda_error() or "no GPU"
    if reason := unsupported_reason(backend, capability):
        return reason
    if missing := [module for module in BACKENDS[backend] if not find.installed(module)]:
        return f"not installed: {', '.join(missing)}"
    if backend == "torch-compile":
        try:
            require_compiler("cuda")
        except DependencyError as error:
            return str(error)
    module = BACKENDS[backend][0]
    return REASONS[module](importlib.import_module(module)) if module in REASONS else None


@pytest.fixture(scope="module", params=[os.environ[BACKEND_VARIABLE]] if BACKEND_VARIABLE in os.environ else BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    backend: str = request.param
    if reason := why_not(backend):
        pytest.skip(reason)
    return backend


@pytest.fixture
def torch_cuda() -> Any:
    """PyTorch on the GPU, to look at it beside the backend."""
    if reason := find.no_torch(torch):
        pytest.skip(reason)
    return torch.cuda


def built(bundle: Path, backend: str, folder: Path, **options: bool) -> Path:
    """`bundle` for that backend: a copy with engines if it runs engines, built with those options."""
    if backend not in FLAVOURS:
        return bundle
    copy = Path(shutil.copytree(bundle, folder / "bundle"))
    build_bundle(copy, backend=backend, profile=PROFILE, options=BuildOptions(**options))
    return copy


@pytest.fixture(scope="module")
def bundle(name: str, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tiny_bundle, name, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def shared(name: str, bundle: Path) -> Iterator[SanaRuntime]:
    with SanaRuntime.from_pretrained(bundle, backend=name, backend_options=EXACT.get(name)) as runtime:
        assert runtime.backend.device == "cuda"
        yield runtime


def draw(runtime: SanaRuntime, prompt: str = "a red apple", **request: Any) -> Any:
    """float32 [B, H, W, 3] in 0 to 1."""
    return np.stack(runtime(prompt, output_type="np", **{**SMALL, **request}).images)


def psnr(one: Any, other: Any) -> float:
    return float(-10.0 * np.log10(max(np.mean((one - other) ** 2), 1e-12)))


@pytest.mark.parametrize("request_name", REQUESTS)
def test_it_draws_what_the_cpu_draws(shared: SanaRuntime, wanted: SanaRuntime, request_name: str) -> None:
    request = REQUESTS[request_name]
    assert psnr(draw(shared, **request), draw(wanted, **request)) >= PSNR_LIMIT


def test_captured_work_is_right_after_other_shapes_were_captured(shared: SanaRuntime) -> None:
    """A, B, A in all orders that matter: the bits of every image are those of its first time."""
    first = {key: draw(shared, **request) for key, request in REQUESTS.items()}
    for key in ("guidance", "another size", "guidance", "PAG", "no guidance", "two images", "PAG", "another size", "guidance"):
        np.testing.assert_array_equal(draw(shared, **REQUESTS[key]), first[key], err_msg=key)


def test_steps_have_the_same_bits_however_they_are_captured(name: str, bundle: Path, shared: SanaRuntime) -> None:
    """As one graph, as a graph for each step, and not at all. In one graph, a context runs at other addresses in each step."""
    if name not in FLAVOURS:
        pytest.skip(f"{name} has no execution contexts")
    with SanaRuntime.from_pretrained(bundle, backend=name, memory="staged", backend_options=EXACT.get(name)) as staged:
        for request in REQUESTS.values():
            enqueued = draw(staged, **request)
            np.testing.assert_array_equal(draw(shared, **request), enqueued)
            np.testing.assert_array_equal(draw(shared, callback_on_step_end=lambda *_: None, **request), enqueued)


@pytest.mark.parametrize(
    "options", [{"text_multiple": 1}, {"cuda_graph_strategy": "whole_graph_capture"}], ids=lambda options: next(iter(options))
)
def test_options_of_engines_change_no_image(name: str, bundle: Path, wanted: SanaRuntime, options: dict[str, Any]) -> None:
    if name != "tensorrt-rtx" and not (name == "tensorrt" and "text_multiple" in options):
        pytest.skip(f"{name} has no such option")
    with SanaRuntime.from_pretrained(bundle, backend=name, backend_options=options) as runtime:
        for request in (*REQUESTS.values(), *REQUESTS.values()):
            assert psnr(draw(runtime, **request), draw(wanted, **request)) >= PSNR_LIMIT


def test_tiles(shared: SanaRuntime, wanted: SanaRuntime) -> None:
    request = {"height": 256, "width": 256, "decoder_tile": 128}
    assert psnr(draw(shared, **request), draw(wanted, **request)) >= PSNR_LIMIT


def test_callbacks_change_latents(shared: SanaRuntime, wanted: SanaRuntime) -> None:
    def halve(_: Any, index: int, timestep: float, tensors: dict[str, Any]) -> Any:
        return {"latents": tensors["latents"] * np.float32(0.5)} if index == 0 else None

    found, reference = (draw(runtime, callback_on_step_end=halve) for runtime in (shared, wanted))
    assert psnr(found, reference) >= PSNR_LIMIT


def test_time_is_the_device_s(shared: SanaRuntime) -> None:
    timings = shared("a fox", **SMALL).timings
    assert 0 < timings.denoise_loop < timings.total
    assert 0 < timings.vae_decoder < timings.total


def test_sprint(name: str, sprint_bundle: Path, tmp_path: Path) -> None:
    bundle = built(sprint_bundle, name, tmp_path)
    with SanaRuntime.from_pretrained(bundle, backend=name) as found, SanaRuntime.from_pretrained(bundle, backend=on_the_cpu) as cpu:
        for seed in (1, 2):
            request = {"num_inference_steps": 2, "seed": seed}
            assert psnr(draw(found, **request), draw(cpu, **request)) >= PSNR_LIMIT


@pytest.mark.parametrize("memory", ["resident", "staged", "streaming"])
def test_memory_modes_draw_the_same_and_give_everything_back(
    name: str, bundle: Path, tiny_bundle: Path, wanted: SanaRuntime, memory: str, tmp_path: Path, torch_cuda: Any
) -> None:
    if memory == "streaming":
        if name not in FLAVOURS:
            pytest.skip(f"{name} cannot stream weights")
        bundle = built(tiny_bundle, name, tmp_path, weight_streaming=True)
    held: list[int] = []
    for _ in range(3):
        with SanaRuntime.from_pretrained(bundle, backend=name, memory=memory) as runtime:
            for request in (REQUESTS["guidance"], REQUESTS["another size"], REQUESTS["guidance"]):
                assert psnr(draw(runtime, **request), draw(wanted, **request)) >= PSNR_LIMIT
        torch_cuda.empty_cache()
        free, total = torch_cuda.mem_get_info()
        held.append(total - free)
    assert held[2] <= held[1] + (64 << 20), f"bytes in use after each runtime was closed: {held}"


def in_threads(*work: Callable[[], Any]) -> list[Any]:
    """The results of all `work`, each in its own thread at the same time."""
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            results[index] = work[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[index] for index in range(len(work))]


def test_two_threads_share_a_runtime(shared: SanaRuntime) -> None:
    requests = [REQUESTS["guidance"], REQUESTS["another prompt"]]
    alone = [draw(shared, **request) for request in requests]

    def three_times(request: dict[str, Any]) -> Any:
        return [draw(shared, **request) for _ in range(3)]

    for found, reference in zip(in_threads(*(lambda r=r: three_times(r) for r in requests)), alone, strict=True):
        for images in found:
            np.testing.assert_array_equal(images, reference)


def test_two_runtimes_at_once(name: str, bundle: Path, shared: SanaRuntime) -> None:
    """One captures while the other runs."""
    reference = draw(shared, **REQUESTS["another prompt"])

    def fresh() -> Any:
        with SanaRuntime.from_pretrained(bundle, backend=name) as runtime:
            return [draw(runtime, **REQUESTS[key]) for key in ("another prompt", "PAG", "another prompt")]

    def busy() -> Any:
        return [draw(shared, **REQUESTS["another prompt"]) for _ in range(6)]

    for found in in_threads(fresh, busy):
        np.testing.assert_array_equal(found[-1], found[0])
        assert psnr(found[0], reference) >= 60.0


def test_loras_are_folded_in_and_taken_out_again(name: str, tiny_bundle: Path, wanted: SanaRuntime, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in ("1.attn1.to_k", "2.attn2.to_v"):
        for key, shape in (("lora_A", (4, 128)), ("lora_B", (128, 4))):
            tensors[f"transformer.transformer_blocks.{layer}.{key}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(tensors, tmp_path / "x.safetensors")
    bundle = built(tiny_bundle, name, tmp_path, refittable=True)
    with SanaRuntime.from_pretrained(bundle, backend=name) as runtime:
        before = draw(runtime)
        runtime.load_lora(tmp_path / "x.safetensors")
        wanted.load_lora(tmp_path / "x.safetensors")
        try:
            found = draw(runtime)
            assert psnr(found, before) < 40.0
            assert psnr(found, draw(wanted)) >= PSNR_LIMIT
        finally:
            wanted.unload_lora()
        runtime.unload_lora()
        np.testing.assert_array_equal(draw(runtime), before)


def test_a_capture_that_fails_is_reported_and_the_image_is_drawn_all_the_same(
    name: str,
    bundle: Path,
    shared: SanaRuntime,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    torch_cuda: Any,
) -> None:
    with SanaRuntime.from_pretrained(bundle, backend=name) as runtime:
        backend = runtime.backend
        if not isinstance(backend, CapturingBackend):
            pytest.skip(f"{name} captures nothing, or by itself")
        capture = backend.capture

        def broken(work: Callable[[], None]) -> Callable[[], None]:
            def and_wait() -> None:
                work()
                torch_cuda.synchronize()  # the driver allows no such call during a capture

            return capture(and_wait)

        monkeypatch.setattr(backend, "capture", broken)
        with caplog.at_level(logging.WARNING):
            found = draw(runtime)
        assert "captur" in caplog.text
        np.testing.assert_array_equal(draw(runtime), found)
    assert psnr(found, draw(shared)) >= 60.0


def test_running_out_of_memory_is_said_and_can_be_recovered_from(
    name: str, bundle: Path, shared: SanaRuntime, torch_cuda: Any
) -> None:
    """While loading and while running. All but a few MiB are taken by somebody else."""
    before = draw(shared)
    side = 256 if name in FLAVOURS else 1024  # engines are built for the sizes of `PROFILE`
    large = {"height": side, "width": side, "num_images_per_prompt": 2, "seed": [1, 2]}
    with SanaRuntime.from_pretrained(bundle, backend=name) as runtime:
        draw(runtime)
        with taken_memory(torch_cuda):
            with pytest.raises(DependencyError, match="memory"), SanaRuntime.from_pretrained(bundle, backend=name) as other:
                draw(other, **large)
            if name not in FLAVOURS:  # engines have reserved what they need
                with pytest.raises(DependencyError, match="memory"):
                    draw(runtime, **large)
        np.testing.assert_array_equal(draw(runtime), before)


@contextlib.contextmanager
def taken_memory(torch_cuda: Any, left: int = 16 << 20) -> Iterator[None]:
    """All of the GPU's memory is taken but `left` bytes."""
    driver = pytest.importorskip("cuda.bindings.driver")
    torch_cuda.empty_cache()
    blocks = []
    size = torch_cuda.mem_get_info()[0] - left
    while size >= left:
        status, address = driver.cuMemAlloc(size)
        if int(status) == 0:
            blocks.append(address)
            size = torch_cuda.mem_get_info()[0] - left
        else:
            size //= 2
    try:
        yield
    finally:
        for address in blocks:
            driver.cuMemFree(address)
